"""ALIVE: a loaded model addressed by site, shown examples, changed for the length of a block.

loading ──▶ Lens ── preparing (chat template, pictures) ──▶ logits
              └── intervening: an Intervention's new weights swapped in by pointer, and exactly back
"""

from affectlens.lens.intervening import Intervention
from affectlens.lens.lens import Lens
from affectlens.lens.loading import load

__all__ = ["Intervention", "Lens", "load"]
