"""Edited checkpoints on disk: `write` a base with interventions in it, or `export` an adapter in PEFT's form.

Everything streams from files to files: no model is built, and memory holds a block of a tensor.
"""

from affectlens.interventions.writing.exporting import export, merge
from affectlens.interventions.writing.recording import read_record
from affectlens.interventions.writing.saving import write

__all__ = ["export", "merge", "read_record", "write"]
