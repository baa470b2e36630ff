"""Draw the drift of single neurons, sorted: whether a few moved far or all a little."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite
from affectlens.sites import MLP
from affectlens.views.figures.style import MEASURES, SEQUENTIAL, SIZE, dress
from affectlens.views.readings.of_drift import language

POINTS = 200  # quantiles a curve: a page or a PDF with a million neurons would be too large to open


def neuron_curves(drift: Drift, *, tower: str = "language", title: str = "") -> go.Figure:
    """Draw one curve a layer for gate, up and down: the relative drift of its neurons, sorted.

    A flat curve means that all neurons moved by a similar amount; a steep left end, that a few moved
    much more. Needs `diff(…, detail="neurons")`; raises `NoSuchSite` if the table has no neurons.
    """
    if "unit" not in drift.frame:
        raise NoSuchSite("this drift has no neurons. Try: diff(…, detail='neurons')")
    frame = language(drift, tower).frame
    # Experts are left out: a curve for each would hide those of the layers.
    frame = frame[(frame["unit"] == "neuron") & frame["layer"].notna() & frame["expert"].isna()]
    roles = [role for role in MLP if role in set(frame["role"])]
    if not roles:
        raise NoSuchSite(f"this drift has no neurons of the {tower} tower. Try: diff(…, detail='neurons')")
    names = [role.removesuffix("_proj") for role in roles]
    figure = make_subplots(cols=len(roles), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=names)
    layers = sorted(int(layer) for layer in set(frame["layer"]))
    for row in frame.to_dict("records"):
        if row["role"] in roles:
            figure.add_trace(_curve(row, layers), row=1, col=1 + roles.index(row["role"]))
    figure.add_trace(_scale(layers))
    dress(figure, title=title, height=370)
    figure.update_layout(showlegend=False, margin_t=figure.layout.margin.t - 30, margin_r=80)
    figure.update_xaxes(tickvals=[0, 25, 50, 75, 100], range=[-2, 102], tickangle=0)
    figure.update_xaxes(title_text="neurons, largest drift first (%)", col=(len(roles) + 1) // 2)
    figure.update_yaxes(rangemode="tozero")
    return figure.update_yaxes(title_text=MEASURES["relative"], col=1)


def _curve(row: dict[Any, Any], layers: list[int]) -> go.Scatter:
    delta, base = (np.asarray(row[name], float) for name in ("unit_frobenius", "unit_base_norm"))
    ratio = 100 * delta[base > 0] / base[base > 0]  # a neuron of zero norm has no relative drift
    at = np.linspace(0.0, 1.0, min(POINTS, max(2, len(ratio))))
    sorted_: NDArray[np.float64] = np.quantile(ratio, 1 - at) if len(ratio) else np.array([])
    layer = int(row["layer"])
    return go.Scatter(
        x=(100 * at[: len(sorted_)]).tolist(),
        y=sorted_.tolist(),
        mode="lines",
        line={"width": 1.6, "color": _shade(layers.index(layer), len(layers))},
        name=f"layer {layer}",
        hovertemplate=(
            f"layer {layer}<br>%{{x:.0f}} % of neurons moved by %{{y:.3g}} % or more<extra></extra>"
        ),
    )


def _shade(at: int, count: int) -> str:
    shades = SEQUENTIAL[2:]  # the lightest two vanish on white
    return shades[round(at / max(1, count - 1) * (len(shades) - 1))]


def _scale(layers: list[int]) -> go.Scatter:
    """Return an empty trace that carries the colour bar of layers, which lines can't have."""
    shades = SEQUENTIAL[2:]
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        hoverinfo="skip",
        marker={
            "color": [layers[0]],
            "cmin": layers[0],
            "cmax": max(layers[-1], layers[0] + 1),
            "colorscale": shades,
            "showscale": True,
            "colorbar": {
                "title": {"text": "layer", "side": "right", "font": {"size": SIZE - 1}},
                "tickfont": {"size": SIZE - 1},
                "tickvals": sorted({layers[0], layers[len(layers) // 2], layers[-1]}),
                "thickness": 12,
                "outlinewidth": 0,
                "x": 1.02,
            },
        },
    )
