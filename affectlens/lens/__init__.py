"""ALIVE: a loaded model addressed by site, shown examples, changed for the length of a block.

loading ──▶ Lens ── preparing (chat template, media) ──▶ logits, answers
              ├── intervening: new weights by pointer, activations by hooks, and exactly back
              ├── recording: what passes a point, or its moments
              ├── paired: a second model in the memory of what differs
              ├── doors: the same model in nnsight and TransformerLens
              └── verifying: what the names say, tested on the modules with recorded inputs
"""

from affectlens.lens.failures import told
from affectlens.lens.hooks.activations import Activations, Statistics, spread
from affectlens.lens.hooks.hooking import Rewrite
from affectlens.lens.hooks.masking import without
from affectlens.lens.hooks.places import module_name
from affectlens.lens.hooks.positions import Moment
from affectlens.lens.hooks.recording import Recording, record
from affectlens.lens.inputs.placeholders import spans
from affectlens.lens.intervening import ActivationIntervention, Intervention
from affectlens.lens.lens import Lens
from affectlens.lens.live import Live
from affectlens.lens.loading import load
from affectlens.lens.paired import Paired
from affectlens.probes.claims import Claim, Verification

__all__ = [
    "ActivationIntervention",
    "Activations",
    "Claim",
    "Intervention",
    "Lens",
    "Live",
    "Moment",
    "Paired",
    "Recording",
    "Rewrite",
    "Statistics",
    "Verification",
    "load",
    "module_name",
    "record",
    "spans",
    "spread",
    "told",
    "without",
]
