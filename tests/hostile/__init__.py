"""Inputs that are broken or hostile, and what each must get."""
