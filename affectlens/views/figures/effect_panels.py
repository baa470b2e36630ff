"""Draw effects: a row a task, a column an action; each group beside its null and the control tuning."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from affectlens.effects.effects import Effects
from affectlens.errors import TableError, near
from affectlens.views.figures.style import CONTROL, INK, NULL, SIZE, SOFT, colour, dress, label, safe
from affectlens.views.readings.of_effects import EffectRow, Outcome, metrics, outcomes

MAIN = ("transplant", "revert")
TITLES = {
    "transplant": "transplant into base<br>(is it sufficient?)",
    "revert": "revert in tuned<br>(is it necessary?)",
    "zero": "set to zero",
    "mean": "set to the mean",
}
DELETED = (
    "Zeroing gate, up or down of a bias-free gated MLP deletes the whole MLP: it says nothing about the gate."
)


def effect_panels(
    effects: Effects, *, metric: str | None = None, actions: Sequence[str] | None = None, title: str = ""
) -> go.Figure:
    """Draw the score after each action, beside base and tuned, with 95 % intervals paired by example.

    Raises `TableError` if the table lacks the metric or an action, or holds no effects.
    """
    name = metric or metrics(effects)[0]
    found = outcomes(effects, name)
    there = list(dict.fromkeys(action for one in found for action in one.actions))
    chosen = list(actions) if actions is not None else [action for action in MAIN if action in there] or there
    for action in chosen:
        if action not in there:
            raise TableError(f"no effect has action={action!r}. Actions: {near(action, there)}")
    if not chosen:
        raise TableError("this Effects table holds only references and controls, no effects to draw")
    found = tuple(one for one in found if set(one.actions) & set(chosen))
    heights = [_slots(one, chosen) for one in found]
    figure = make_subplots(
        rows=len(found), cols=len(chosen), shared_xaxes="rows", shared_yaxes="rows", row_heights=heights,
        horizontal_spacing=0.06, vertical_spacing=min(0.3, 78 / (60 * len(found) + 34 * sum(heights))),
        subplot_titles=[TITLES.get(action, label(action)) for action in chosen],
    )  # fmt: skip
    for row, one in enumerate(found, 1):
        for column, action in enumerate(chosen, 1):
            _panel(figure, one, action=action, at=(row, column))
    note = 44 if "zero" in chosen else 0
    dress(figure, title=title, height=150 + note + 70 * (len(found) - 1) + 36 * sum(heights))
    # Room for two rows of legend: in a narrow window one is not enough.
    figure.update_layout(margin_t=150 if title else 120, margin_b=60 + note)
    for heading in figure.layout.annotations[: len(chosen)]:
        heading.yshift = 17  # else it would cover the names of the lines for base and tuned
    if note:
        figure.add_annotation(
            text=DELETED, x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="bottom",
            yshift=-54 - note, showarrow=False, align="left", font={"size": SIZE - 1, "color": SOFT},
        )  # fmt: skip
    return figure


def _slots(one: Outcome, actions: Sequence[str]) -> int:
    return max(2, *(len(one.changes(action)) for action in actions))


def _panel(figure: go.Figure, one: Outcome, *, action: str, at: tuple[int, int]) -> None:
    row, column = at
    changes = one.changes(action)[::-1]  # plotly counts rows from the bottom
    for trace in _traces(one, changes, action=action):
        if len(trace.x):
            # Every panel has the same traces; the legend lists each once.
            named = any(other.name == trace.name for other in figure.data)
            trace.update(showlegend=not named, legendgroup=trace.name)
            figure.add_trace(trace, row=row, col=column)
    gain = one.gain
    if gain is not None:
        ends = sorted([(gain.baseline, "base"), (gain.baseline + gain.effect, "tuned")])
        for (x, name), anchor in zip(ends, ("right", "left"), strict=True):
            figure.add_vline(x=x, row=row, col=column, line={"color": INK, "width": 1, "dash": "dot"})
            figure.add_annotation(
                text=name, x=x, y=1, yref="y domain", xanchor=anchor, yanchor="bottom", showarrow=False,
                row=row, col=column,
            )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(changes))), ticktext=[label(change.name) for change in changes],
        range=[-0.6, _slots(one, [action]) - 0.4], row=row, col=column,
    )  # fmt: skip
    fit = ", trained on" if one.fitted else ""
    figure.update_xaxes(
        title_text=f"{safe(one.task, 28)}{fit}: {safe(one.metric, 16)}",
        showticklabels=True,
        row=row,
        col=column,
    )


def _traces(one: Outcome, changes: Sequence[EffectRow], *, action: str) -> list[go.Scatter]:
    null = [(change.baseline + effect, y) for y, change in enumerate(changes) for effect in one.null(change)]
    controls = [
        (y, control)
        for y, change in enumerate(changes)
        if (control := one.change(action, change.group, kind="control-tuning")) is not None
    ]
    return [
        go.Scatter(
            name="null draws",
            x=[x for x, _ in null],
            y=[y for _, y in null],
            mode="markers",
            marker={"symbol": "line-ns", "size": 18, "line": {"color": NULL, "width": 1}},
            hovertemplate="null draw (a random role in each layer)<br>score %{x:.4g}<extra></extra>",
        ),
        _dots([(y - 0.24, change) for y, change in controls], name="control tuning",
              marker={"symbol": "diamond-open", "size": 9, "color": CONTROL, "line": {"width": 1.6}}),
        _dots(list(enumerate(changes)), name="tuned, 95 % interval",
              marker={"size": 11, "color": [colour(change.hue) for change in changes]}),
    ]  # fmt: skip


def _dots(places: Sequence[tuple[float, EffectRow]], *, name: str, marker: dict[str, object]) -> go.Scatter:
    changes = [change for _, change in places]
    return go.Scatter(
        name=name,
        x=[change.baseline + change.effect for change in changes],
        y=[y for y, _ in places],
        mode="markers",
        marker=marker,
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [change.high - change.effect for change in changes],
            "arrayminus": [change.effect - change.low for change in changes],
            "color": SOFT if "control" not in name else CONTROL,
            "thickness": 1.6,
            "width": 3,
        },
        customdata=[_hover(change) for change in changes],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _hover(change: EffectRow) -> str:
    span = f" ({change.interval})" if change.interval else ""
    score = change.baseline + change.effect
    return f"<b>{safe(change.name)}</b><br>score {score:.4g}<br>effect {change.effect:+.4g}{span}"
