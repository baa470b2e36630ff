"""ALIVE: a loaded model addressed by site, shown examples, changed for the length of a block.

loading ──▶ Lens ── preparing (chat template, media) ──▶ logits, answers
              ├── intervening: new weights by pointer, activations by hooks, and exactly back
              ├── recording: what passes a point, or its moments
              ├── paired: a second model in the memory of what differs
              ├── doors: the same model in nnsight and TransformerLens
              └── verifying: what the names say, tested on the modules with recorded inputs
"""

from affectlens.lens.activations import Activations, Statistics, spread
from affectlens.lens.hooking import Rewrite
from affectlens.lens.intervening import ActivationIntervention, Intervention
from affectlens.lens.lens import Lens
from affectlens.lens.loading import load
from affectlens.lens.masking import without
from affectlens.lens.moments import Moment
from affectlens.lens.paired import Paired
from affectlens.lens.places import module_name
from affectlens.lens.recording import Recording
from affectlens.lens.remembering import remembering_senses
from affectlens.lens.telling import told
from affectlens.lens.verifying import Claim, Verification

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
    "spread",
    "told",
    "without",
]
