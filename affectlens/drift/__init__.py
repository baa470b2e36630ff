"""HOW FAR: the distance of every site from base to tuned, read from files and never through a model.

Pairing ── measuring, block by block ──▶ Drift (rows + ledger) ── contrasting ──▶ beside noise and control
"""

from affectlens.drift.diffing import diff
from affectlens.drift.drift import Drift

__all__ = ["Drift", "diff"]
