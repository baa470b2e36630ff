"""SHOWN: tables become figures, sentences and a report; nothing is measured here, and torch is not imported.

Drift, Effects ── readings ──▶ figures ── plotting ──▶ .html .json .png .svg .pdf
                      └──────▶ sentences ──▶ conclusions ──▶ report ──▶ one self-contained page
"""

from affectlens.views.plotting import Plot, plot
from affectlens.views.report.report import Report
from affectlens.views.sentences.conclusions import Conclusions, conclude

__all__ = ["Conclusions", "Plot", "Report", "conclude", "plot"]
