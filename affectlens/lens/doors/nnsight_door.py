"""The door to nnsight: the module of a lens as an `NNsight`, with interventions compiled into its edits.

    interventions ──▶ rewrites ──▶ an edit a place: reads the envoy's input or output, gives it the new one
                  └─▶ weights ───▶ an edit of the whole run: swaps pointers at its start, and back at its end

The hooks are those of `lens.intervene`, called where nnsight hands a value over, so both give the same bits.
Importing nnsight changes the interpreter (`nnsight_of` says how), so it is imported when the door is opened.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError
from affectlens.lens.hooks.hooking import Hook, Rewrite
from affectlens.lens.hooks.positions import Moments
from affectlens.lens.intervening import ActivationIntervention, Intervention, Remarking, hooks_of
from affectlens.lens.live import refuse_compiled, refuse_whole
from affectlens.sites import Point, Site

if TYPE_CHECKING:
    from affectlens.lens.lens import Lens


def nnsight_of(lens: "Lens", *interventions: Intervention | ActivationIntervention) -> Any:
    """Wrap the very module of a lens in a `nnsight.NNsight` whose every run has the interventions.

    A run is `with sight.trace(**batch):`, `sight.trace(**batch, trace=False)`, `with sight.generate(...):` or
    `sight.generate(...)`. Called as `sight(**batch)`, or by the lens, the model runs as it is. A block reads
    what our edits have made, and what it writes comes after them. What becomes of activations is worked out
    here, once; other weights are read from their donor and swapped in at each run, and are back when it ends,
    fails or is interrupted. One trace has one invoke, whose batch is the model's own. Runs are local, one at
    a time: what nnsight runs elsewhere is another model.

    While the wrapper lives nnsight stands in each module's `forward`, and does nothing outside of runs. It is
    taken out when the wrapper is gone, or at the end of `with lens.nnsight(...) as sight:`. What importing
    nnsight does to Python stays: every object has a method `save`, `torch.Tensor.backward` looks at the line
    that calls it, and on Linux (x86-64) the C library's `backtrace` finds nothing, unless
    `NNSIGHT_DISABLE_CPP_BACKTRACE=0` is set.

    Raises `LensError` and `NoSuchSite` as `lens.intervene` would, and `LensError` where a part is compiled.
    """
    refuse_compiled(lens.model)
    refuse_whole(lens.model)
    moments = Moments(lens.model)
    weights, hooks = _compiled(lens, interventions, moments)

    from affectlens.lens.doors.nnsight_edits import Run, Wrapped, edit

    wrapped = Wrapped(lens.model)
    if interventions:
        edit(wrapped, Run(lens, weights, moments=moments, hooks=hooks))
    return wrapped


@dataclass(frozen=True)
class OnWeights:
    """What an intervention does to weights, and nothing else of it; asked again at every run."""

    of: Intervention

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """The new values of each site."""
        return self.of.edits(live)

    def remarks(self, lens: "Lens") -> Sequence[str]:
        """What the intervention has to say."""
        return _remarks(self.of, lens)


@dataclass(frozen=True)
class OnActivations:
    """What an intervention does to activations, worked out once."""

    of: ActivationIntervention
    known: Mapping[Point, Rewrite]

    def rewrites(self, lens: "Lens") -> Mapping[Point, Rewrite]:
        """The rewrites as they are."""
        return self.known

    def remarks(self, lens: "Lens") -> Sequence[str]:
        """What the intervention has to say."""
        return _remarks(self.of, lens)


def _remarks(one: object, lens: "Lens") -> Sequence[str]:
    return one.remarks(lens) if isinstance(one, Remarking) else ()


def _compiled(
    lens: "Lens", interventions: Sequence[Intervention | ActivationIntervention], moments: Moments
) -> tuple[list[OnWeights], list[Hook]]:
    """Work out each intervention with those before it in force, as it would be in a `with` block."""
    weights: list[OnWeights] = []
    hooks: list[Hook] = []
    with ExitStack() as stack:
        for one in interventions:
            if not isinstance(one, Intervention | ActivationIntervention):
                raise LensError(f"{type(one).__name__} is no intervention: it has neither edits nor rewrites")
            if isinstance(one, Intervention):
                weights.append(OnWeights(one))
                stack.enter_context(lens.intervene(weights[-1]))
            if isinstance(one, ActivationIntervention):
                known = one.rewrites(lens)
                hooks += hooks_of(lens, known, moments=moments)
                stack.enter_context(lens.intervene(OnActivations(one, known)))
    return weights, hooks
