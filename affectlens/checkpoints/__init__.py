"""WEIGHTS ON DISK: open checkpoints by their headers, and pair two of them site by site.

    source ── opening ──▶ Store (names, shapes) ── checkpoint ──▶ Checkpoint (sites) ── pairing ──▶ Pairing
                │
                ├─ folders ──▶ safetensors | pickles/     files on disk
                ├─ hub/ ─────▶ safetensors                ranges of remote files
                ├─ memory                                 a live module
                ├─ quantized (eight_bit, four_bit)        weights unpacked as they are read
                └─ adapters/                              LoRA factors over a base

No model is built to read a checkpoint, and torch is imported only when tensors are read.
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
