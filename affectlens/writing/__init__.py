"""Edited checkpoints on disk: `write` a base with interventions in it, or `export` an adapter in PEFT's form.

Everything streams from files to files: no model is built, and memory holds a block of a tensor.
"""

from affectlens.writing.export import export, merge
from affectlens.writing.provenance import read_record
from affectlens.writing.saving import write

__all__ = ["export", "merge", "read_record", "write"]
