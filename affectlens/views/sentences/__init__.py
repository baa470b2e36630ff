"""Sentences: what a drift and effects show in words, each derived from the numbers of the readings."""
