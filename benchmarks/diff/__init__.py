"""How fast `affectlens.diff` is: ratios to a read floor and to what one would write by hand.

generating ─▶ contestants ─▶ timing ─▶ figures ─▶ the table; beside them probing (compiling and memory, in
an interpreter of their own), accuracy and lora. `docs/performance.md` says what the figures mean.
"""
