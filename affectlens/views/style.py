"""The one look of every figure: role order, colours that survive colour blindness and print, layout."""

import html
from typing import Any

import plotly.graph_objects as go

from affectlens.html import plain
from affectlens.sites import ATTENTION, MLP

ROLES = (*ATTENTION, *MLP)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SIZE = 13.0

INK, SOFT, LINE, EMPTY = "#1c2733", "#5b6875", "#dfe5ea", "#eceff2"
GATE, UP, OTHER, CONTROL = "#d55e00", "#0072b2", "#8799a8", "#6b7680"
NULL = "#94a1ad"
# One hue, monotone in lightness: reads the same in grey and under every colour blindness.
SEQUENTIAL = ["#f3f7fa", "#cfdfeb", "#9fc1da", "#6a9fc5", "#3a7aa9", "#1c5583", "#0b305a"]

MEASURES = {
    "relative": "‖Δ‖ / ‖W‖ (%)",
    "rms": "rms of Δ (per element)",
    "frobenius": "‖Δ‖ (Frobenius)",
    "mean_abs": "mean |Δ| (per element)",
    "max_abs": "max |Δ|",
    "cosine": "cosine of W base and W tuned",
}


def safe(name: object, most: int = 200) -> str:
    """Escape a name for plotly, which reads a subset of HTML but not every entity, and TeX between two $.

    >>> safe("<b>'x'</b> $y$")
    "&lt;b&gt;'x'&lt;/b&gt; &#36;y&#36;"
    """
    return html.escape(plain(name, most), quote=False).replace("$", "&#36;")


def label(name: object) -> str:
    """Escape a name that stands beside an axis: so short that it leaves room for the figure."""
    return safe(name, 36)


def colour(role: str | None) -> str:
    """The colour of a role: gate and up stand out, since the claim is about them."""
    return {"gate_proj": GATE, "up_proj": UP}.get(role or "", OTHER)


def dress(figure: go.Figure, *, title: str, height: float) -> go.Figure:
    """Give a figure the common fonts, margins, grid and legend; the title is escaped."""
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
    figure.layout.legend.y = (height - (38 if title else 4)) / height
    figure.update_xaxes(**_axis())
    figure.update_yaxes(**_axis())
    figure.update_annotations(font={"size": SIZE, "color": INK})
    return figure


def _axis() -> dict[str, Any]:
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
