"""Broken or hostile inputs, and the error or warning that each must get."""
