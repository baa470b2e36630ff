"""WEIGHTS ON DISK: open checkpoints by their headers, and pair two of them site by site.

    source ── opening ──▶ Store (names, shapes) ── checkpoint ──▶ Checkpoint (sites) ── pairing ──▶ Pairing
                │
                ├─ folders ──▶ safetensors | pickles/     files on disk
                ├─ hub/ ─────▶ safetensors                ranges of remote files
                ├─ memory                                 a live module
                ├─ quantized (eight_bit, four_bit)        weights unpacked as they are read
                ├─ meta_format                            names and rows as transformers has them
                └─ adapters/                              LoRA factors over a base

`weight_files` says which files of a folder are weights, and what a folder without any is. A pairing knows
`tying` (one matrix as both embeddings), `vocabulary` (rows of the same tokens) and `settings` (of configs).

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
