"""Torch's own files, `.bin .pth .pt`, read as data: no function that they name is ever called.

file ── archives ──▶ pickle ── unpickling, rebuilding ──▶ records ── envelopes ──▶ tensors ── torch_store
"""
