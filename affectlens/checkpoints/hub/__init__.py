"""Repositories on a hub: listed once, read by ranges where they lie, fetched whole where that must be."""
