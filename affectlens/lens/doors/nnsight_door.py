"""The door to nnsight: the module of a lens as an `NNsight`, with interventions compiled into its edits.

    interventions ──▶ rewrites ──▶ one edit per place: reads the envoy's input or output, replaces it
                  └─▶ weights ───▶ one edit of the whole run: swaps pointers at its start, and back at its end

The hooks are those of `lens.intervene`, called where nnsight hands over a value, so both give the same bits.
Importing nnsight changes the interpreter (see `nnsight_of`), so it is imported only when the door is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError
from affectlens.lens.intervening import ActivationIntervention, Intervening, Intervention
from affectlens.lens.live import Live, refuse_compiled, refuse_whole
from affectlens.sites import Site


def nnsight_of(lens: Live, *interventions: Intervention | ActivationIntervention) -> Any:
    """Wrap the very module of a lens in an `nnsight.NNsight`; the interventions apply in each of its runs.

    A run is `with sight.trace(**batch):`, `sight.trace(**batch, trace=False)`, `with sight.generate(...):` or
    `sight.generate(...)`. Called as `sight(**batch)`, or by the lens, the model runs without them. A trace
    block reads values after our edits, and what it writes replaces them. Rewrites of activations are computed
    here, once; weights are read from their donor and swapped in at each run, and put back when it ends,
    fails or is interrupted. A trace has one invoke, whose batch is the model's own. Runs are local, one at a
    time: remote execution would run another copy of the model.

    While the wrapper exists, nnsight replaces each module's `forward`; outside runs this changes nothing. It
    is removed when the wrapper is deleted, or at the end of `with lens.nnsight(...) as sight:`. Importing
    nnsight changes Python for good: every object gets a method `save`, `torch.Tensor.backward` inspects the
    calling line, and on Linux (x86-64) the C library's `backtrace` finds nothing unless
    `NNSIGHT_DISABLE_CPP_BACKTRACE=0` is set.

    Raises `LensError` and `NoSuchSite` as `lens.intervene` does, and `LensError` where a part is compiled.
    """
    refuse_compiled(lens.model)
    refuse_whole(lens.model)
    if lens.adapters_off:
        raise LensError(
            "nnsight runs the model itself, with its adapters. Use PEFT's block around the runs: "
            "with lens.model.disable_adapter(): …"
        )
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
