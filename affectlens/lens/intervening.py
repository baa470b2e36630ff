"""Change weights and activations for the length of a block, then put the very same tensors back.

What an intervention has to provide is defined here as protocols, so that the lens knows no intervention.
Weights are swapped by pointer, never edited in place: `w += d; w -= d` changes 2 % of bfloat16 elements for
good. Activations are rewritten by hooks.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, warn
from affectlens.lens.holding import hold
from affectlens.lens.hooks.hooking import Hook, Rewrite
from affectlens.lens.hooks.layouts import learn
from affectlens.lens.hooks.moments import Moments
from affectlens.lens.hooks.places import (
    HEAD_NORMS,
    names_medium,
    place_of,
    refuse_unheard,
    writes_placeholders,
)
from affectlens.lens.hooks.recomputing import refuse_late
from affectlens.lens.live import Live, refuse_compiled, remark, tokenizer_of
from affectlens.lens.restoring import Swaps, atomic, interruptible, raise_waiting
from affectlens.lens.swapping import Swap, guard, swapped
from affectlens.sites import Point, Site


@runtime_checkable
class Intervention(Protocol):
    """Anything that returns new values for some sites, given the live weights."""

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """Return the new values of each site; shapes as in `live`."""
        ...


@runtime_checkable
class ActivationIntervention(Protocol):
    """Anything that returns, for some points, a function of the activations there."""

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return for each point a function from the values that arrive to those that go on."""
        ...


@runtime_checkable
class Remarking(Protocol):
    """An intervention that warns where its numbers could be misread."""

    def remarks(self, lens: Live) -> Sequence[str]:
        """Return sentences that a user should read before any number."""
        ...


class Intervening:
    """Apply interventions in order, each seeing what those before it left.

    The doors to nnsight and TransformerLens enter this same block to learn what interventions change: `swaps`
    and `hooks` are kept after it. Without `held`, other threads may run the model. A class and not a
    generator: an interrupt that falls between the block and a generator's `finally` would skip it.
    """

    def __init__(
        self,
        lens: Live,
        interventions: Sequence[Intervention | ActivationIntervention],
        *,
        held: bool = True,
    ) -> None:
        for one in interventions:
            if not isinstance(one, Intervention | ActivationIntervention):
                raise LensError(
                    f"{type(one).__name__} is not an intervention: it has neither a method edits(live) nor "
                    f"rewrites(lens)"
                )
        self._lens, self._interventions, self._held = lens, interventions, held
        self._undo = Swaps()
        self.moments = Moments(lens.model, tokenizer_of(lens.processor))
        self.swaps: list[Swap] = []
        self.hooks: list[Hook] = []

    @atomic
    def __enter__(self) -> "Intervening":
        self._undo.open()
        self.swaps, self.hooks = [], []
        try:
            if self._held:
                hold(self._undo, self._lens.model, adapters_off=self._lens.adapters_off)
            with self._lens.known.pinning(self._lens.model):
                self._apply()
            # Passes that an intervention ran to compute its values do not count as passes of the block.
            self.moments.passes = 0
            for hook in self.hooks:
                hook.reached = 0
            raise_waiting()
        except BaseException:
            self._undo.undo()
            raise
        return self

    @atomic
    def _apply(self) -> None:
        for intervention in self._interventions:
            edits = self._edits(intervention)
            swaps, hooks = self._new_weights(edits), self._new_hooks(intervention)
            self._remark(intervention)
            # Swapping `.data` keeps the Parameter itself, so that tied modules see the change together and
            # stay tied.
            for owner, name, value in swaps:
                self._undo.swap(owner, name, value=value)
            guard(self._undo, self._lens, edits=edits)
            if swaps and not self.swaps:
                refuse_late(self._undo, self._lens.model)
            self._put(hooks)
            self.swaps += swaps

    @atomic
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._undo.undo()
        if kind is None and self.moments.passes:
            warn_of_idle(self.hooks, passes=self.moments.passes)
        self.moments.forget()

    @interruptible
    def _remark(self, intervention: object) -> None:
        for words in intervention.remarks(self._lens) if isinstance(intervention, Remarking) else ():
            remark(self._lens, words)

    @interruptible
    def _edits(self, intervention: object) -> Mapping[Site, Tensor]:
        return intervention.edits(self._lens.checkpoint) if isinstance(intervention, Intervention) else {}

    @interruptible
    def _new_weights(self, edits: Mapping[Site, Tensor]) -> list[Swap]:
        return swapped(self._lens, edits) if edits else []

    @interruptible
    def _new_hooks(self, intervention: object) -> list[Hook]:
        if not isinstance(intervention, ActivationIntervention):
            return []
        rewrites = intervention.rewrites(self._lens)
        if rewrites:
            refuse_compiled(self._lens.model)
        return _hooks_of(self._lens, rewrites, moments=self.moments)

    def _put(self, hooks: list[Hook]) -> None:
        if hooks and not self.hooks:
            self.moments.follow(self._undo)
        for hook in hooks:
            module = self._lens.model.get_submodule(hook.place.module)
            self._undo.hook(module, hook, side=hook.side)
        self.hooks += hooks


def warn_of_idle(hooks: Sequence[Hook], *, passes: int) -> None:
    """Warn of points whose positions matched nothing in all forward passes of a block."""
    idle = [hook.point for hook in hooks if not hook.reached]
    if idle:
        others = f" and {len(idle) - 1} more points" if idle[1:] else ""
        warn(f"{idle[0]!r}{others} matched no position in {passes} forward passes: nothing was changed there")


def _hooks_of(lens: Live, rewrites: Mapping[Point, Rewrite], *, moments: Moments) -> list[Hook]:
    """Return the hooks of some rewrites; points that name one place and span are rewritten once."""
    found: dict[object, Hook] = {}
    for point, rewrite in rewrites.items():
        place = place_of(point, model=lens.model, live=lens.checkpoint)
        refuse_unheard(point, place, model=lens.model)
        unread = writes_placeholders(point, model=lens.model, live=lens.checkpoint)
        say = partial(remark, lens) if unread and not names_medium(point.span) else None
        found.setdefault((place, point.span), Hook(point, place, rewrite, moments, say=say))
    hooks = list(found.values())
    learn(lens.model, [hook.place for hook in hooks if hook.point.site.role in HEAD_NORMS])
    return hooks
