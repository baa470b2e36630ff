"""Record and rewrite what passes in a forward pass.

point ── places ──▶ module, features ────┐
call of the model ── moments, positions ─┼─▶ hooking: rewrite the values ──▶ recording ──▶ activations
what passes ── layouts ──▶ its dimensions ┘

`masking` rewrites attention masks instead. `media_masks` and `media_padding` tell the padding of pictures and
sounds, `recomputing` the passes that gradient checkpointing repeats.
"""
