"""Sentences that follow from the readings."""
