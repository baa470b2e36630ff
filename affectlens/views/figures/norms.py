"""Draw roles under several norms, beside the control and iid noise: each role, and one over another."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from affectlens.drift.drift import Drift
from affectlens.views.figures.style import CONTROL, EMPTY, GATE, INK, MEASURES, colour, dress, label
from affectlens.views.readings.numbers import NORMS
from affectlens.views.readings.numbers import figure as digits
from affectlens.views.readings.of_drift import Moved, moved


def role_bars(drift: Drift, *, title: str = "") -> go.Figure:
    """Draw the relative drift and the rms of each role; the two may rank the roles differently.

    The black lines are iid noise: the expected value if every weight changed by the same rms, that of
    all seven roles together. Raises `NoSuchSite` if the language tower has none of these roles.
    """
    sides = ("relative", "rms")
    figure = make_subplots(
        cols=2, horizontal_spacing=0.14, subplot_titles=["relative to the norm of the base", "per element"]
    )
    sums = moved(drift)
    for column, measure in enumerate(sides, 1):
        for trace in _bars(sums, measure, legend=column == 1):
            figure.add_trace(trace, row=1, col=column)
        figure.update_yaxes(title_text=MEASURES[measure], rangemode="tozero", col=column)
    dress(figure, title=title, height=370)
    figure.update_layout(barmode="group", bargap=0.28, bargroupgap=0.06)
    figure.update_yaxes(exponentformat="power", showexponent="all")
    return figure.update_xaxes(showgrid=False, tickangle=0)


def norm_contrast(
    drift: Drift, *, first: str = "gate_proj", second: str = "up_proj", title: str = ""
) -> go.Figure:
    """Draw the median over layers of first/second under each norm: tuned, control, iid noise.

    Raises `NoSuchSite` if the tuning could reach both roles in no layer of the language tower.
    """
    rows = drift.contrast(first, second)
    rows = rows[rows["ratio"].notna()][::-1].reset_index(drop=True)
    figure = go.Figure()
    shown = rows[[name for name in rows if str(name).endswith("ratio")]].replace(np.inf, np.nan)
    low, high = np.nanmin([0.92, shown.min().min()]), np.nanmax([1.08, shown.max().max()])
    for trace in _traces(rows, high):
        figure.add_trace(trace)
    figure.add_vline(x=1.0, line={"color": INK, "width": 1})
    dress(figure, title=title, height=130 + 44 * max(3, len(rows)))
    names = [
        f"{NORMS.get(str(norm), label(norm))}   {int(larger)}/{int(layers)}"
        for norm, larger, layers in zip(rows["norm"], rows["first_larger"], rows["layers_known"], strict=True)
    ]
    one, two = label(first), label(second)
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=names,
        range=[-0.6, len(rows) - 0.4],
        title_text=f"norm, layers with<br>larger {one}",
    )
    # The axis spans at least 0.92 to 1.08, or a ratio of 1.01 would look like a large difference.
    figure.update_xaxes(range=[low - 0.04 * (high - low), high + 0.04 * (high - low)])
    return figure.update_xaxes(title_text=f"{one} / {two} (median)")


def _bars(sums: Moved, measure: str, *, legend: bool) -> list[go.Bar | go.Scatter]:
    scale = 100.0 if measure == "relative" else 1.0
    tuned, control = sums.column(measure), sums.column(f"control_{measure}")
    noise = sums.column(f"noise_{measure}")
    roles = [str(role) for role in sums.rows["role"]]
    ticks = [role.removesuffix("_proj") for role in roles]
    traces: list[go.Bar | go.Scatter] = [
        go.Bar(
            name="tuned − base",
            x=ticks,
            y=[scale * tuned[role] if role in tuned else None for role in roles],
            marker={"color": [colour(role) for role in roles]},
            hovertemplate="%{x} tuned: %{y:.4g}<extra></extra>",
        )
    ]
    if control:
        traces.append(
            go.Bar(
                name="control − base",
                x=ticks,
                y=[scale * control[role] if role in control else None for role in roles],
                marker={"color": EMPTY, "line": {"color": CONTROL, "width": 1.2}},
                hovertemplate="%{x} control: %{y:.4g}<extra></extra>",
            )
        )
    traces.append(
        go.Scatter(
            name="iid noise, equal rms",
            x=ticks,
            y=[scale * noise[role] if role in noise else None for role in roles],
            mode="markers",
            marker={"symbol": "line-ew", "size": 20, "line": {"color": INK, "width": 2}},
            hovertemplate="%{x} iid noise: %{y:.4g}<extra></extra>",
        )
    )
    for trace in traces:
        trace.update(showlegend=legend, legendgroup=trace.name)
    return traces


def _traces(rows: pd.DataFrame, edge: float) -> list[go.Scatter]:
    # Later traces are drawn on top: the tuned one comes last, so that none hides it.
    looks = {
        "control_": ("control − base", {"symbol": "diamond-open", "size": 11, "color": CONTROL,
                                        "line": {"width": 2}}),
        "noise_": ("iid noise, equal rms", {"symbol": "line-ns", "size": 20,
                                                       "line": {"color": INK, "width": 2}}),
        "": ("tuned − base", {"symbol": "circle", "size": 12, "color": GATE}),
    }  # fmt: skip
    traces = []
    for prefix, (name, marker) in looks.items():
        if f"{prefix}ratio" not in rows:
            continue
        ratio = rows[f"{prefix}ratio"].astype(float)
        endless = ratio == np.inf  # the second role did not move: drawn at the edge, marked with ∞
        traces.append(
            go.Scatter(
                name=name,
                x=ratio.where(~endless, edge).tolist(),
                y=list(range(len(rows))),
                mode="markers+text" if endless.any() else "markers",
                text=["∞" if one else "" for one in endless],
                textposition="middle left",
                marker=marker,
                customdata=[digits(one, 4) for one in ratio],
                hovertemplate="ratio %{customdata}<extra></extra>",
            )
        )
    return traces
