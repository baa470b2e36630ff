"""Readings: the numbers of a table that both figures and sentences use, computed in one place."""
