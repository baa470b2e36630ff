"""Change weights for the length of a block, by pointer, and put the very tensors back.

The protocol an intervention meets is here, so that a lens needs to know none of them. Weights are
never edited in place: `w += d; w -= d` changes 2 % of bfloat16 elements for good.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.slicing import put
from affectlens.errors import LensError
from affectlens.lens.restoring import Swaps, atomic, interruptible, raise_waiting
from affectlens.sites import Site


@runtime_checkable
class Intervention(Protocol):
    """Anything that says which sites get which values, given the live weights as they are."""

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """The new values of each site; shapes as in `live`."""
        ...


class Intervening:
    """Swap the interventions' values in, in order, each seeing what those before it left.

    A class and not a generator: an interrupt that falls between the block and a generator's `finally`
    would skip it.
    """

    def __init__(
        self,
        interventions: Sequence[Intervention],
        *,
        parameters: Mapping[str, nn.Parameter],
        live: Checkpoint,
    ) -> None:
        self._interventions, self._parameters, self._live = interventions, parameters, live
        self._swaps = Swaps()

    @atomic
    def __enter__(self) -> None:
        try:
            for intervention in self._interventions:
                # Swapping `.data` keeps the Parameter itself, so that tied modules see the change
                # together and stay tied.
                for name, value in _tensors(self._parameters, self._live, intervention).items():
                    self._swaps.swap(self._parameters[name], "data", value=value)
            raise_waiting()
        except BaseException:
            self._swaps.undo()
            raise

    @atomic
    def __exit__(self, *_: object) -> None:
        self._swaps.undo()


@interruptible
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
