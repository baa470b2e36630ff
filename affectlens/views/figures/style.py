"""Give every figure one look: colours safe for colour blindness and print, layout, widths of venues."""

import html
from dataclasses import dataclass

import plotly.graph_objects as go

from affectlens.errors import TableError, near
from affectlens.printable import plain

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SIZE = 13.0
INK, SOFT, LINE, EMPTY = "#1c2733", "#5b6875", "#dfe5ea", "#eceff2"
GATE, UP, OTHER, CONTROL = "#d55e00", "#0072b2", "#8799a8", "#6b7680"
NULL = "#94a1ad"
# One hue, monotone in lightness: it can be read in grey and with any colour blindness.
SEQUENTIAL = ["#f3f7fa", "#cfdfeb", "#9fc1da", "#6a9fc5", "#3a7aa9", "#1c5583", "#0b305a"]
MEASURES = {
    "relative": "‖Δ‖ / ‖W‖ (%)",
    "rms": "rms of Δ (per element)",
    "frobenius": "‖Δ‖ (Frobenius)",
    "mean_abs": "mean |Δ| (per element)",
    "max_abs": "max |Δ|",
    "cosine": "cosine of W base and W tuned",
}
PIXELS, POINTS = 96.0, 72.0  # an inch in CSS pixels and in printer's points


def safe(name: object, most: int = 200) -> str:
    """Escape a name for plotly, which interprets some HTML tags and entities, and TeX between two $.

    >>> safe("<b>'x'</b> $y$")
    "&lt;b&gt;'x'&lt;/b&gt; &#36;y&#36;"
    """
    return html.escape(plain(name, most), quote=False).replace("$", "&#36;")


def label(name: object) -> str:
    """Escape a name beside an axis, cut so that it leaves room for the figure."""
    return safe(name, 36)


def colour(role: str | None) -> str:
    """Return the colour of a role: gate and up have their own, since the claim under study is about them."""
    return {"gate_proj": GATE, "up_proj": UP}.get(role or "", OTHER)


def dress(figure: go.Figure, *, title: str, height: float) -> go.Figure:
    """Set the common fonts, margins, grid and legend of a figure; the title is escaped."""
    figure.update_layout(
        template="none",
        title={"text": safe(title, 90), "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 10},
               "y": 1, "yref": "container", "yanchor": "top", "font": {"size": SIZE + 3}},
        font={"family": FONT, "size": SIZE, "color": INK},
        height=height,
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        margin={"l": 70, "r": 24, "t": 96 if title else 66, "b": 60},
        legend={"orientation": "h", "x": 0, "xref": "container", "y": 1, "yref": "container",
                "yanchor": "top", "font": {"size": SIZE - 1}},
        hoverlabel={"font": {"family": FONT, "size": SIZE - 1}, "align": "left"},
        dragmode=False,
    )  # fmt: skip
    if title:
        figure.layout.title.pad.t = 12
    # In pixels below the top edge: legend.y is a share of the height, which differs by figure.
    figure.layout.legend.y = (height - (38 if title else 4)) / height
    figure.update_xaxes(**_axis())
    figure.update_yaxes(**_axis())
    # Titles of subplots are annotations, and take no font from the layout.
    figure.update_annotations(font={"size": SIZE, "color": INK})
    return figure


def _axis() -> dict[str, object]:
    return {
        "gridcolor": LINE,
        "linecolor": "#9aa6b1",
        "zeroline": False,
        "automargin": True,
        "title_font_size": SIZE - 1,
        "title_standoff": 10,
        "tickfont_size": SIZE - 1,
        "ticks": "",
    }


@dataclass(frozen=True)
class Venue:
    """The width of a figure in inches and its type size in points."""

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
    """Return a copy as wide as a venue's text (or column), with all type scaled and without the title.

    In a paper the caption takes the title's place. Raises `TableError` for an unknown venue.
    """
    if venue not in VENUES:
        raise TableError(f"no venue {venue!r}. Venues: {near(venue, VENUES, most=30)}")
    size = VENUES[venue].font * PIXELS / POINTS
    ratio = size / SIZE
    copy = go.Figure(figure)  # the plot's own figure keeps its size
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
