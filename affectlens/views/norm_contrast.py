"""Gate against up over the norms: a claim that hangs on the choice of norm is seen to hang on it."""

import pandas as pd
import plotly.graph_objects as go

from affectlens.drift.drift import Drift
from affectlens.views.moved import contrasted
from affectlens.views.style import CONTROL, GATE, INK, dress, safe
from affectlens.views.wording import NORMS


def norm_contrast(
    drift: Drift, *, first: str = "gate_proj", second: str = "up_proj", title: str = ""
) -> go.Figure:
    """Draw the median over layers of first/second under each norm: tuned, control, noise alone.

    Raises `NoSuchSite` where the language tower has no layer whose two roles the tuning could reach.
    """
    rows = contrasted(drift, first=first, second=second)
    rows = rows[rows["ratio"].notna()][::-1].reset_index(drop=True)
    figure = go.Figure()
    for trace in _traces(rows):
        figure.add_trace(trace)
    figure.add_vline(x=1.0, line={"color": INK, "width": 1})
    dress(figure, title=title, height=130 + 44 * max(3, len(rows)))
    names = [
        f"{NORMS.get(str(norm), safe(norm))}   {int(larger)}/{int(layers)}"
        for norm, larger, layers in zip(rows["norm"], rows["first_larger"], rows["layers"], strict=True)
    ]
    one, two = safe(first), safe(second)
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=names,
        range=[-0.6, len(rows) - 0.4],
        title_text=f"norm, layers with<br>{one} larger",
    )
    shown = rows[[name for name in rows if str(name).endswith("ratio")]]
    low, high = min(0.92, float(shown.min().min())), max(1.08, float(shown.max().max()))
    # Roles that differ by a hundredth must not look worlds apart.
    figure.update_xaxes(range=[low - 0.04 * (high - low), high + 0.04 * (high - low)])
    return figure.update_xaxes(title_text=f"{one} / {two} (median)")


def _traces(rows: pd.DataFrame) -> list[go.Scatter]:
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
        traces.append(
            go.Scatter(
                name=name,
                x=rows[f"{prefix}ratio"].tolist(),
                y=list(range(len(rows))),
                mode="markers",
                marker=marker,
                hovertemplate="ratio %{x:.4g}<extra></extra>",
            )
        )
    return traces
