"""Draw the drift map: layer × role, the control's map beside it on the same colour scale."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from affectlens.drift.drift import Drift
from affectlens.errors import TableError, near
from affectlens.views.figures.style import EMPTY, MEASURES, SEQUENTIAL, SIZE, dress, label, safe
from affectlens.views.readings.numbers import NORMS
from affectlens.views.readings.numbers import figure as digits
from affectlens.views.readings.of_drift import ROLES, language, totals

# Measures that the control has too. `control_cosine` is none: it is the angle between the two changes.
TWIN = tuple(NORMS)
FEW = 12  # up to so many layers, a number fits into each cell


def drift_map(
    drift: Drift, *, measure: str = "relative", tower: str = "language", title: str = ""
) -> go.Figure:
    """Draw a measure by layer and role of one tower; grey cells have no value or were out of reach.

    Raises `TableError` for an unknown measure, `NoSuchSite` for a tower without attention or
    feed-forward sites.
    """
    known = [name for name in drift.frame.select_dtypes("number") if name not in ("layer", "expert", "size")]
    if measure not in known:
        raise TableError(f"no measure {measure!r}. Measures: {near(measure, known, most=30)}")
    kept = language(drift, tower)
    kept = Drift(kept.frame[kept.frame["layer"].notna()], kept.origin)
    cells = _cells(kept, measure)
    if cells[measure].isna().all():
        raise TableError(
            f"{measure!r} was not measured where the tuning could reach the {tower} tower: every value is "
            "null. For an adapter, diff(…, detail='exact') measures more"
        )
    own = [f"control_{name}" for name in TWIN]
    sides = [("control − base" if measure in own else "tuned − base", measure)]
    if measure in TWIN and f"control_{measure}" in cells and cells[f"control_{measure}"].notna().any():
        sides.append(("control − base", f"control_{measure}"))
    figure = make_subplots(
        cols=len(sides), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=[n for n, _ in sides]
    )
    for column, (_, name) in enumerate(sides, 1):
        figure.add_trace(_heatmap(cells, name), row=1, col=column)
    layers = cells["layer"].nunique()
    dress(figure, title=title, height=max(300, min(1000, 170 + (30 if layers <= FEW else 17) * layers)))
    return _finish(figure, cells, names=[name for _, name in sides])


def _cells(drift: Drift, measure: str) -> pd.DataFrame:
    rows = totals(drift, ["layer", "role"])
    if measure not in rows:  # it doesn't add up, such as a cosine: take the mean weighted by size
        frame = drift.frame[drift.frame[measure].notna()]
        frame = frame.assign(_mass=frame[measure].astype(float) * frame["size"])
        sums = frame.groupby(["layer", "role"])[["_mass", "size"]].sum(min_count=1)
        mean = (sums["_mass"] / sums["size"]).rename(measure).reset_index()
        rows = rows.merge(mean, on=["layer", "role"], how="left")
    names = drift.frame.groupby(["layer", "role"])["parameter"].agg(list).rename("names").reset_index()
    return rows.merge(names, on=["layer", "role"])


def _heatmap(cells: pd.DataFrame, name: str) -> go.Heatmap:
    layers = sorted(set(cells["layer"]))
    scale = _scale(name)
    z = np.full((len(layers), len(ROLES)), np.nan)
    hover = np.full(z.shape, "", dtype=object)
    for row in cells.to_dict("records"):
        at = layers.index(row["layer"]), ROLES.index(str(row["role"]))
        z[at] = scale * row[name]
        hover[at] = _hover({str(key): value for key, value in row.items()}, name)
    few = len(layers) <= FEW
    return go.Heatmap(
        z=z.tolist(),
        x=list(range(len(ROLES))),
        y=list(range(len(layers))),
        customdata=hover.tolist(),
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,  # a gap has no values to show
        coloraxis="coloraxis",
        xgap=1.5,
        ygap=1.5 if few else 0.6,
        texttemplate="%{z:.3~g}" if few else None,
        textfont={"size": SIZE - 1},
    )


def _scale(name: str) -> float:
    return 100.0 if name.endswith("relative") else 1.0


def _hover(row: dict[str, Any], name: str) -> str:
    names = row["names"]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    prefix = "control_" if name.startswith("control_") else ""
    return (
        f"<b>layer {int(row['layer'])} {row['role']}</b><br>{safe(names[0])}{more}<br>"
        f"{safe(name)} {digits(row[name], 4)}<br>{int(row['size']):,} elements<br>"
        f"‖Δ‖ {digits(row[prefix + 'frobenius'], 4)}   ‖W‖ {digits(row['base_norm'], 4)}"
    )


def _finish(figure: go.Figure, cells: pd.DataFrame, *, names: list[str]) -> go.Figure:
    layers = sorted(int(layer) for layer in set(cells["layer"]))
    step = 1 if len(layers) <= 20 else 2 if len(layers) <= 40 else 4
    values = cells[names].to_numpy(dtype=float) * _scale(names[0])
    percent = " (%)" if names[0].endswith("relative") else ""
    measure = MEASURES.get(names[0], label(names[0]) + percent)
    # Colours of norms start at zero, or small differences would look large; cosines all lie close to one.
    bounded = names[0] != "cosine" and float(np.nanmin(values)) >= 0
    figure.update_layout(
        margin_t=figure.layout.margin.t - 34,
        plot_bgcolor=EMPTY,
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": 0.0 if bounded else float(np.nanmin(values)),
            "cmax": float(np.nanmax(values)) or 1.0,
            "colorbar": {
                "title": {"text": measure, "side": "right", "font": {"size": SIZE - 1}},
                "tickfont": {"size": SIZE - 1},
                "thickness": 12,
                "outlinewidth": 0,
                "x": 1.02,
            },
        },
    )
    ticks = [role.removesuffix("_proj") for role in ROLES]
    figure.update_xaxes(
        tickvals=list(range(len(ROLES))), ticktext=ticks, showgrid=False, title_text="role", tickangle=0
    )
    shown = [index for index, layer in enumerate(layers) if not layer % step]
    figure.update_yaxes(
        tickvals=shown,
        ticktext=[str(layers[i]) for i in shown],
        showgrid=False,
        range=[-0.5, len(layers) - 0.5],
    )
    figure.update_yaxes(title_text="layer (0 is the first)", col=1)
    return figure
