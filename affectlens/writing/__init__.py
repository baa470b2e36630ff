"""ON DISK: `write` a base with interventions in it, or `export` an adapter in PEFT's form.

    interventions ── edited_store (tensors made when they are read) ┐
    base ── saving (its files) ─────────────────────────────────────┴─▶ shards ─▶ folder (whole or not there)
    adapter ── export (factors under PEFT's names) ───────────────────▶ shards ─▶ folder
    what was done ──────────────────────────────────────────────────────── provenance ─▶ affectlens.json

Weights stream from files to files: no model is built, and memory holds a block of a tensor.
"""

from affectlens.writing.export import export, merge
from affectlens.writing.provenance import read_record
from affectlens.writing.saving import write

__all__ = ["export", "merge", "read_record", "write"]
