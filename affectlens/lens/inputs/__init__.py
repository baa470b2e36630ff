"""Turn examples into model input with the model's own chat template and processor.

files ── processors ──▶ processor
example ── rendering ──▶ text ── preparing (with pictures, sounds, films) ──▶ batch
examples ── batching ──▶ batches, of one length each where the model reads padding
"""
