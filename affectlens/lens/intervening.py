"""Change weights and activations for the length of a block, and leave the very tensors that were there.

The protocol an intervention meets is here, so that a lens needs to know none of them. Weights are swapped by
pointer, never edited in place: `w += d; w -= d` changes 2 % of bfloat16 elements for good. Activations are
rewritten by hooks where they pass.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, Remark
from affectlens.lens.hooks.hooking import Hook, Rewrite
from affectlens.lens.hooks.places import place_of, refuse_unheard
from affectlens.lens.hooks.positions import Moments
from affectlens.lens.live import refuse_compiled
from affectlens.lens.restoring import Swaps, atomic, interruptible, raise_waiting
from affectlens.lens.swapping import Swap, swapped
from affectlens.sites import Point, Site

if TYPE_CHECKING:
    from affectlens.lens.lens import Lens


@runtime_checkable
class Intervention(Protocol):
    """Anything that says which sites get which values, given the live weights as they are."""

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """The new values of each site; shapes as in `live`."""
        ...


@runtime_checkable
class ActivationIntervention(Protocol):
    """Anything that says what becomes of the activations at which points."""

    def rewrites(self, lens: "Lens") -> Mapping[Point, Rewrite]:
        """The function of each point, from the values that pass to those that go on."""
        ...


@runtime_checkable
class Remarking(Protocol):
    """An intervention that has something to say of what it does to this model."""

    def remarks(self, lens: "Lens") -> Sequence[str]:
        """What a user should know before reading any number, in sentences."""
        ...


class Intervening:
    """Apply interventions in order, each seeing what those before it left.

    A class and not a generator: an interrupt that falls between the block and a generator's `finally`
    would skip it.
    """

    def __init__(self, lens: "Lens", interventions: Sequence[Intervention | ActivationIntervention]) -> None:
        for one in interventions:
            if not isinstance(one, Intervention | ActivationIntervention):
                raise LensError(f"{type(one).__name__} is no intervention: it has neither edits nor rewrites")
        self._lens, self._interventions = lens, interventions
        self._swaps, self._moments = Swaps(), Moments(lens.model)
        self._hooks: list[Hook] = []

    @atomic
    def __enter__(self) -> None:
        self._swaps.open()
        try:
            for intervention in self._interventions:
                swaps, hooks = self._swapped(intervention), self._made(intervention)
                self._remark(intervention)
                # Swapping `.data` keeps the Parameter itself, so that tied modules see the change
                # together and stay tied.
                for owner, name, value in swaps:
                    self._swaps.swap(owner, name, value=value)
                self._put(hooks)
            # What an intervention ran to know its values was no pass of the block.
            self._moments.passes = 0
            for hook in self._hooks:
                hook.reached = 0
            raise_waiting()
        except BaseException:
            self._swaps.undo()
            raise

    @atomic
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._swaps.undo()
        if kind is None and self._moments.passes:
            idle = [hook.point for hook in self._hooks if not hook.reached]
            if idle:
                others = f" and {len(idle) - 1} more points" if idle[1:] else ""
                passes = f"{self._moments.passes} forward passes"
                _warn(f"{idle[0]!r}{others} chose nothing in {passes}: nothing was changed there", frames=3)
        self._hooks = []
        self._moments.forget()

    @interruptible
    def _remark(self, intervention: object) -> None:
        if isinstance(intervention, Remarking):
            for words in intervention.remarks(self._lens):
                if words not in self._lens.told:
                    self._lens.told.add(words)
                    _warn(words, frames=4)

    @interruptible
    def _swapped(self, intervention: object) -> list[Swap]:
        if not isinstance(intervention, Intervention):
            return []
        return swapped(self._lens, intervention.edits(self._lens.checkpoint))

    def _put(self, hooks: list[Hook]) -> None:
        if hooks and not self._hooks:
            self._moments.follow(self._swaps)
        for hook in hooks:
            module = self._lens.model.get_submodule(hook.place.module)
            self._swaps.hook(module, hook, side=hook.side)
        self._hooks += hooks

    @interruptible
    def _made(self, intervention: object) -> list[Hook]:
        if not isinstance(intervention, ActivationIntervention):
            return []
        rewrites = intervention.rewrites(self._lens)
        if rewrites:
            refuse_compiled(self._lens.model)
        return hooks_of(self._lens, rewrites, moments=self._moments)


def hooks_of(lens: "Lens", rewrites: Mapping[Point, Rewrite], *, moments: Moments) -> list[Hook]:
    """The hooks of some rewrites; points that name one place and span are rewritten once."""
    found: dict[object, Hook] = {}
    for point, rewrite in rewrites.items():
        place = place_of(point, model=lens.model, live=lens.checkpoint)
        refuse_unheard(point, place, model=lens.model)
        found.setdefault((place, point.span), Hook(point, place, rewrite, moments))
    return list(found.values())


def _warn(words: str, *, frames: int) -> None:
    """Warn at the line of the `with` block, so many frames up."""
    warnings.warn(words, Remark, stacklevel=frames)
