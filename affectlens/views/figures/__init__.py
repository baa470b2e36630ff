"""Figures: one file each, a function from a table to a Plotly figure; `style` gives all one look."""
