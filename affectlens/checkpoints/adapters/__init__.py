"""PEFT adapters and bare trainables: sort their tensors, find the scale, lay the change over a base.

names ── factor_names ──▶ pairs ┐
config, preset ── recipes ──▶ scale ┴─ adapter ──▶ Checkpoint of effective weights ── low_rank ──▶ scale·B·A
"""
