"""WHAT IS ON DISK: checkpoints opened by their headers, and two of them paired site by site.

    source ── opening ──▶ Store (names, shapes) ── locate ──▶ Checkpoint ── pairing ──▶ Pairing + ledger

No model is ever built to read a checkpoint, and torch is imported only when tensors are read.
"""

from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.opening import Look, Source, look, open_checkpoint
from affectlens.checkpoints.pairing import Pairing, pair
from affectlens.checkpoints.store import Header, Store

__all__ = [
    "Checkpoint",
    "Header",
    "Look",
    "Pairing",
    "Source",
    "Store",
    "look",
    "open_checkpoint",
    "pair",
]
