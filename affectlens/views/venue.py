"""Venues: the column widths and type sizes of journals and conferences, so that a figure fits as it is."""

from dataclasses import dataclass

import plotly.graph_objects as go

from affectlens.errors import TableError, near
from affectlens.views.style import SIZE

PIXELS, POINTS = 96.0, 72.0  # an inch in CSS pixels and in printer's points


@dataclass(frozen=True)
class Venue:
    """A width in inches and a type size in points."""

    width: float
    font: float = 8.0


VENUES = {
    "acl": Venue(6.30),
    "acl-column": Venue(3.03),
    "neurips": Venue(5.50),
    "iclr": Venue(5.50),
    "icml": Venue(6.75),
    "icml-column": Venue(3.25),
    "cvpr": Venue(6.875),
    "cvpr-column": Venue(3.25),
    "aaai": Venue(7.00),
    "aaai-column": Venue(3.30),
    "acm": Venue(7.00),
    "acm-column": Venue(3.33),
    "ieee": Venue(7.16),
    "ieee-column": Venue(3.50),
    "nature": Venue(7.20, 7.0),
    "nature-column": Venue(3.50, 7.0),
}


def fitted(figure: go.Figure, venue: str) -> go.Figure:
    """Return a copy as wide as a venue's text (or column), all type scaled, without the title.

    Raises `TableError` for an unknown venue. A paper says in its caption what a title would.
    """
    if venue not in VENUES:
        raise TableError(f"no venue {venue!r}. Venues: {near(venue, VENUES, most=30)}")
    size = VENUES[venue].font * PIXELS / POINTS
    ratio = size / SIZE
    copy = go.Figure(figure)
    copy.update_layout(
        width=round(VENUES[venue].width * PIXELS),
        height=round(figure.layout.height * ratio),
        title_text="",
        font_size=size,
        legend_font_size=size * 0.95,
        margin={side: round(figure.layout.margin[side] * ratio) for side in "lrtb"},
    )
    copy.update_xaxes(title_font_size=size, tickfont_size=size * 0.95)
    copy.update_yaxes(title_font_size=size, tickfont_size=size * 0.95)
    for note in copy.layout.annotations:
        note.font.size = (note.font.size or SIZE) * ratio
    bar = copy.layout.coloraxis.colorbar
    bar.update(title_font_size=size * 0.95, tickfont_size=size * 0.95, thickness=10)
    copy.update_traces(textfont_size=size * 0.85, selector={"type": "heatmap"})
    for trace in copy.select_traces(selector={"type": "scatter"}):
        trace.marker.size = (trace.marker.size or 6) * ratio
    return copy
