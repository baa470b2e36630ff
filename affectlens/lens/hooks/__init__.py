"""Record and rewrite what passes in a forward pass.

point ── places ──▶ module, features ┐
call of the model ── positions ──────┴─▶ hooking: rewrite the values ──▶ recording ──▶ activations
"""
