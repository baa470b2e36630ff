"""ALIVE: a loaded model addressed by site, shown examples, changed for the length of a block.

loading ──▶ Lens ── preparing (chat template, pictures) ──▶ logits
              ├── intervening: an Intervention's new weights swapped in by pointer, and exactly back
              └── verifying: what the names say, tested on the modules with recorded inputs
"""

from affectlens.lens.intervening import Intervention
from affectlens.lens.lens import Lens
from affectlens.lens.loading import load
from affectlens.lens.remembering import remembering_senses
from affectlens.lens.telling import told
from affectlens.lens.verifying import Claim, Verification

__all__ = ["Claim", "Intervention", "Lens", "Verification", "load", "remembering_senses", "told"]
