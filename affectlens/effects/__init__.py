"""WHAT CHANGED: the behaviour under each intervention, beside a null that could have done the same.

a task ── evaluating ──▶ Scores
Grid ── sweeping ──▶ jobs ── judging: intervene, evaluate, undo ──▶ Effects (value, interval, null, control)
                                ├── caching: towers that no intervention changes run once per input
                                └── journal: each result is kept at once, so a killed sweep resumes
"""

from typing import TYPE_CHECKING

from affectlens.lazy import resolver

if TYPE_CHECKING:
    from affectlens.effects.effects import Effects
    from affectlens.effects.evaluating import evaluate
    from affectlens.effects.grid import Grid
    from affectlens.effects.sweeping import sweep

__all__ = ["Effects", "Grid", "evaluate", "sweep"]
__getattr__ = resolver(
    __name__, {"Effects": "effects", "Grid": "grid", "evaluate": "evaluating", "sweep": "sweeping"}
)
