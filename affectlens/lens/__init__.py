"""ALIVE: a loaded model addressed by site, shown examples, changed for the length of a block.

loading ──▶ Lens ── preparing (chat template, media) ──▶ logits, answers
              ├── intervening: new weights by pointer, activations by hooks, and exactly back
              ├── recording: what passes a point, or its moments
              ├── paired: a second model in the memory of what differs
              ├── doors: the same model in nnsight and TransformerLens
              └── verifying: what the names say, tested on the modules with recorded inputs
"""

from affectlens.lens.hooks.activations import Activations, Statistics, spread
from affectlens.lens.hooks.hooking import Rewrite
from affectlens.lens.hooks.masking import without
from affectlens.lens.hooks.moments import Moment
from affectlens.lens.hooks.places import module_name
from affectlens.lens.hooks.recording import Recording
from affectlens.lens.inputs.spans import spans
from affectlens.lens.intervening import ActivationIntervention, Intervention
from affectlens.lens.lens import Lens
from affectlens.lens.models.loading import load
from affectlens.lens.probes.verifying import Claim, Verification
from affectlens.lens.remembering import remembering_senses
from affectlens.lens.telling import told
from affectlens.lens.weights.paired import Paired

__all__ = [
    "ActivationIntervention",
    "Activations",
    "Claim",
    "Intervention",
    "Lens",
    "Moment",
    "Paired",
    "Recording",
    "Rewrite",
    "Statistics",
    "Verification",
    "load",
    "module_name",
    "remembering_senses",
    "spans",
    "spread",
    "told",
    "without",
]
