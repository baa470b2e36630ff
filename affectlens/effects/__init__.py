"""WHAT CHANGED: the behaviour under each intervention, beside nulls that could have done the same.

Grid ──▶ units ── sweeping: intervene, evaluate, undo ──▶ Effects (value, interval, null, control)
"""

from affectlens.effects.effects import Effects
from affectlens.effects.evaluating import evaluate
from affectlens.effects.grid import Grid
from affectlens.effects.sweeping import sweep

__all__ = ["Effects", "Grid", "evaluate", "sweep"]
