"""Doors to the neighbours: the model of a lens in the hands of another library, with our interventions."""
