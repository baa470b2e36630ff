"""Gate against up over the norms: a claim that hangs on the choice of norm is seen to hang on it."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from affectlens.drift.drift import Drift
from affectlens.views.moved import contrasted
from affectlens.views.style import CONTROL, GATE, INK, dress, label
from affectlens.views.wording import NORMS
from affectlens.views.wording import figure as digits


def norm_contrast(
    drift: Drift, *, first: str = "gate_proj", second: str = "up_proj", title: str = ""
) -> go.Figure:
    """Draw the median over layers of first/second under each norm: tuned, control, noise alone.

    Raises `NoSuchSite` where the language tower has no layer whose two roles the tuning could reach.
    """
    rows = contrasted(drift, first=first, second=second)
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
        title_text=f"norm, layers with<br>{one} larger",
    )
    # Roles that differ by a hundredth must not look worlds apart.
    figure.update_xaxes(range=[low - 0.04 * (high - low), high + 0.04 * (high - low)])
    return figure.update_xaxes(title_text=f"{one} / {two} (median)")


def _traces(rows: pd.DataFrame, edge: float) -> list[go.Scatter]:
    looks = {
        "control_": ("control − base", {"symbol": "diamond-open", "size": 11, "color": CONTROL,
                                        "line": {"width": 2}}),
        "noise_": ("noise alone, one rms", {"symbol": "line-ns", "size": 20,
                                                       "line": {"color": INK, "width": 2}}),
        "": ("tuned − base", {"symbol": "circle", "size": 12, "color": GATE}),
    }  # fmt: skip
    traces = []
    for prefix, (name, marker) in looks.items():
        if f"{prefix}ratio" not in rows:
            continue
        ratio = rows[f"{prefix}ratio"].astype(float)
        endless = ratio == np.inf  # the second role did not move: drawn at the edge, and marked
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
