"""One file per figure: a table in, a Plotly figure out."""
