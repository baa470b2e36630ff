"""The door to nnsight: the module of a lens as an `NNsight`, with interventions compiled into its edits.

    interventions ──▶ rewrites ──▶ an edit a place: reads the envoy's input or output, gives it the new one
                  └─▶ weights ───▶ an edit of the whole run: swaps pointers at its start, and back at its end

The hooks are those of `lens.intervene`, called where nnsight hands a value over, so both give the same bits.
Importing nnsight changes the interpreter (`nnsight_of` says how), so it is imported when the door is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.lens.intervening import ActivationIntervention, Intervening, Intervention
from affectlens.lens.live import Live, refuse_compiled, refuse_whole
from affectlens.sites import Site


def nnsight_of(lens: Live, *interventions: Intervention | ActivationIntervention) -> Any:
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
    with Intervening(lens, interventions) as block:
        pass

    from affectlens.lens.doors.nnsight_edits import Run, Wrapped, edit

    wrapped = Wrapped(lens.model)
    if interventions:
        weights = [_WeightsOnly(one) for one in interventions if isinstance(one, Intervention)]
        edit(wrapped, Run(lens, weights, moments=block.moments, hooks=block.hooks))
    return wrapped


@dataclass(frozen=True)
class _WeightsOnly:
    """The part of an intervention that changes weights; asked again at every run."""

    of: Intervention

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """Return the new values of each site."""
        return self.of.edits(live)
