"""Turn examples into model input with the model's own chat template and processor.

files ── processors ──▶ processor
example ── prompt_format (with rendering) ──▶ text ── preparing (with media) ──▶ batch
        ── choices ──▶ batch and the tokens of each label behind it
examples ── batching ──▶ batches, of one length each where the model reads padding
"""
