"""SHOWN: tables become figures, sentences and one report; nothing is measured here, and torch stays away.

Drift, Effects ── outcome ──▶ figures ── plotting ──▶ .html .json .pdf
               └─ conclusions ──▶ sentences ──┴─ report ──▶ one self-contained file
"""

from affectlens.views.plotting import Plot, plot
from affectlens.views.report.report import Report
from affectlens.views.sentences.conclusions import Conclusions, conclude

__all__ = ["Conclusions", "Plot", "Report", "conclude", "plot"]
