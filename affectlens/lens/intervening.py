"""Change weights for the length of a block, by pointer, and put the very tensors back.

The protocol an intervention meets is here, so that a lens needs to know none of them. Weights are
never edited in place: `w += d; w -= d` changes 2 % of bfloat16 elements for good.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.slicing import put
from affectlens.errors import LensError
from affectlens.sites import Site


@runtime_checkable
class Intervention(Protocol):
    """Anything that says which sites get which values, given the live weights as they are."""

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """The new values of each site; shapes as in `live`."""
        ...


@contextmanager
def intervening(
    interventions: Sequence[Intervention], *, parameters: Mapping[str, nn.Parameter], live: Checkpoint
) -> Iterator[None]:
    """Swap the interventions' values in, in order, each seeing what those before it left."""
    undo: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for intervention in interventions:
            for name, value in _tensors(parameters, live, intervention).items():
                parameter = parameters[name]
                undo.append((parameter, parameter.data))
                # Swapping `.data` keeps the Parameter itself, so that tied modules see the change
                # together and stay tied.
                parameter.data = value
        yield
    finally:
        for parameter, before in reversed(undo):
            parameter.data = before


def _tensors(
    parameters: Mapping[str, nn.Parameter], live: Checkpoint, intervention: Intervention
) -> dict[str, Tensor]:
    """Gather edits of sites into whole new tensors of parameters, fused ones slice by slice."""
    new: dict[str, Tensor] = {}
    for site, value in intervention.edits(live).items():
        if tuple(value.shape) != live.shape(site):
            raise LensError(f"{site} has shape {live.shape(site)}, the new values {tuple(value.shape)}")
        where = live.at(site)
        old = parameters[where.tensor]
        if old.device.type == "meta":
            raise LensError(f"{site} is offloaded, so its weights can't be swapped; load without offloading")
        value = value.to(device=old.device, dtype=old.dtype)
        if where.size == old.numel() and not where.transposed:
            new[where.tensor] = value.reshape(old.shape)
        else:
            if where.tensor not in new:
                new[where.tensor] = old.data.clone()
            put(new[where.tensor], where, value=value)
    return new
