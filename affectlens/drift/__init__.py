"""HOW FAR: the distance of every site from base to tuned, read from files and never through a model.

Pairing ── measuring, block by block ──▶ Drift (rows + ledger) ── contrasting ──▶ beside noise and control
"""

from typing import TYPE_CHECKING

from affectlens.lazy import resolver

if TYPE_CHECKING:
    from affectlens.drift.diffing import diff
    from affectlens.drift.drift import Drift

__all__ = ["Drift", "diff"]
__getattr__ = resolver(__name__, {"Drift": "drift", "diff": "diffing"})
