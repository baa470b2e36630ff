"""The report: sentences, figures and tables of numbers on one self-contained HTML page."""
