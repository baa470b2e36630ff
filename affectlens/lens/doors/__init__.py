"""Doors to other libraries: the model of a lens in nnsight or TransformerLens, with our interventions."""
