"""Measure how fast `affectlens.diff` is, relative to a read floor and to code written by hand.

generating ─▶ contestants ─▶ timing ─▶ figures ─▶ the table; beside them probing (compiling and memory, in
a separate interpreter), accuracy and lora. `docs/performance.md` says what the figures mean.
"""
