"""Role bars: how far each role moved under two norms that disagree, beside the control and noise alone."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from affectlens.drift.drift import Drift
from affectlens.views.moved import Moved, moved
from affectlens.views.style import CONTROL, EMPTY, INK, MEASURES, colour, dress


def role_bars(drift: Drift, *, title: str = "") -> go.Figure:
    """Draw the relative drift and the rms of each role, which need not agree.

    The black line is 'noise alone': what a change of one rms in every weight, that of the seven
    roles taken together, would give. Raises `NoSuchSite` where the language tower has no such role.
    """
    sides = ("relative", "rms")
    figure = make_subplots(
        cols=2, horizontal_spacing=0.14, subplot_titles=["relative to the base's norm", "per element"]
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
            name="noise alone, one rms",
            x=ticks,
            y=[scale * noise[role] if role in noise else None for role in roles],
            mode="markers",
            marker={"symbol": "line-ew", "size": 20, "line": {"color": INK, "width": 2}},
            hovertemplate="%{x} noise alone: %{y:.4g}<extra></extra>",
        )
    )
    for trace in traces:
        trace.update(showlegend=legend, legendgroup=trace.name)
    return traces
