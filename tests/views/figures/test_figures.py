"""Figures show the numbers of their tables; names from files reach plotly escaped."""

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.errors import TableError
from affectlens.views.figures.drift_map import drift_map
from affectlens.views.figures.effect_panels import effect_panels
from affectlens.views.figures.norms import norm_contrast, role_bars

Drifts = Callable[..., Drift]
Sweeps = Callable[..., Effects]
MOVED = {"o_proj": 0.4, "gate_proj": 0.2, "up_proj": 0.1}


def test_map_has_layers_by_roles_in_order(make_drift: Drifts) -> None:
    """A cell of the map is the relative drift in percent; roles are ordered q k v o gate up down."""
    figure = drift_map(make_drift(layers=3, scale={"gate_proj": 2.0}))
    tuned = figure.data[0]

    assert ("q", "k", "v", "o", "gate", "up", "down") == figure.layout.xaxis.ticktext
    assert 100 * 0.002 * 192**0.5 / 8 == pytest.approx(tuned.z[0][4])
    assert 100 * 0.001 * 192**0.5 / 10 == pytest.approx(tuned.z[2][5])


def test_map_puts_control_on_the_same_scale(make_drift: Drifts) -> None:
    """The control's panel shares the colour axis; without a control there is one panel."""
    both, alone = drift_map(make_drift()), drift_map(make_drift(control=False))

    assert ["coloraxis", "coloraxis"] == [trace.coloraxis for trace in both.data]
    assert 100 * 0.0005 * 64**0.5 / 4 == pytest.approx(both.data[1].z[0][0])
    assert 1 == len(alone.data)


def test_map_draws_any_measure(make_drift: Drifts) -> None:
    """A measure that does not add up is averaged by size."""
    figure = drift_map(make_drift(), measure="cosine")

    assert 0.999 == pytest.approx(figure.data[0].z[0][0])


def test_map_leaves_unreached_cells_empty(make_drift: Drifts) -> None:
    """A cell that the tuning could not reach is empty, not zero."""
    drift = make_drift()
    drift.frame.loc[drift.frame["role"] == "v_proj", "targeted"] = False
    row = [z == z for z in drift_map(drift).data[0].z[0]]

    assert [True, True, False, True, True, True, True] == row


def test_bars_show_both_norms_control_and_noise(make_drift: Drifts) -> None:
    """With equal rms everywhere, every bar ends at the line of iid noise under both norms."""
    traces = {(trace.name, trace.xaxis): list(trace.y) for trace in role_bars(make_drift()).data}
    tuned, noise = "tuned − base", "iid noise, equal rms"

    assert traces[tuned, "x"] == pytest.approx(traces[noise, "x"])
    assert [0.001] * 7 == pytest.approx(traces[tuned, "x2"])
    assert [0.0005] * 7 == pytest.approx(traces["control − base", "x2"])


def test_contrast_shows_ratios_beside_noise(make_drift: Drifts) -> None:
    """Under iid noise, the ratio of relative drifts is the inverse ratio of the base norms: 10/8."""
    ratios = {trace.name: list(trace.x) for trace in norm_contrast(make_drift()).data}

    assert [1.0, 1.0, 1.25, 1.0, 1.0] == pytest.approx(ratios["tuned − base"])
    assert 1.25 == pytest.approx(ratios["iid noise, equal rms"][2])
    assert 1.25 == pytest.approx(ratios["control − base"][2])


def test_effects_are_drawn_on_the_scale_of_scores(make_effects: Sweeps) -> None:
    """Transplants start from base, reverts from tuned; intervals, null and control are drawn beside them."""
    figure = effect_panels(make_effects(MOVED))
    dots = [trace for trace in figure.data if trace.name.startswith("tuned")]
    null = next(trace for trace in figure.data if trace.name.startswith("null"))
    control = next(trace for trace in figure.data if trace.name.startswith("control"))

    assert [0.6, 0.7, 0.9] == pytest.approx(list(dots[0].x))
    assert [1.42, 1.34, 1.18] == pytest.approx(list(dots[1].x))
    assert [0.05] * 3 == pytest.approx(list(dots[0].error_x.array))
    assert 3 * 20 == len(null.x)
    assert [0.52] * 3 == pytest.approx(list(control.x))
    assert {"base", "tuned"} <= {note.text for note in figure.layout.annotations}


def test_zero_ablation_carries_its_note(make_effects: Sweeps) -> None:
    """A figure of zeroed roles notes that it says nothing about the gate."""
    figure = effect_panels(make_effects(MOVED, actions=("transplant", "zero")), actions=["zero"])

    assert any("says nothing about the gate" in note.text for note in figure.layout.annotations)


def test_unknown_action_and_metric_are_errors(make_effects: Sweeps) -> None:
    """An unknown action or metric is an error that suggests the nearest one."""
    with pytest.raises(TableError, match=r"no effect has action='reverse'.*Did you mean 'revert'"):
        effect_panels(make_effects(MOVED), actions=["reverse"])
    with pytest.raises(TableError, match="no rows have metric='acuracy'"):
        effect_panels(make_effects(MOVED), metric="acuracy")


def test_small_multiples_have_a_row_a_task(make_effects: Sweeps) -> None:
    """Two tasks make two rows of panels, the affective task first."""
    one, two = make_effects(MOVED, kind="control", task="sums"), make_effects(MOVED)
    both = Effects(
        pd.concat([one.frame, two.frame]), {"tasks": {**one.origin["tasks"], **two.origin["tasks"]}}
    )
    titles = [axis.title.text for axis in effect_panels(both).select_xaxes()]

    assert ["emotion: margin"] * 2 + ["sums: margin"] * 2 == titles


def test_names_are_escaped_in_every_figure(make_drift: Drifts, make_effects: Sweeps, hostile: str) -> None:
    """No text of a figure contains a tag from a name in a file."""
    drift = make_drift()
    drift.frame["parameter"] = hostile
    effects = make_effects({hostile: 0.4, "gate_proj": 0.2}, task=hostile, metric=hostile)
    figures = [drift_map(drift, title=hostile), role_bars(drift, title=hostile), effect_panels(effects)]

    assert [] == [
        text for figure in figures for text in _texts(json.loads(figure.to_json())) if "<img" in text
    ]


def _texts(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [text for part in inner for text in _texts(part)]


def test_nothing_measured_and_nothing_done_are_errors(make_drift: Drifts, make_effects: Sweeps) -> None:
    """A column of nulls and a table without rows are errors."""
    drift, effects = make_drift(), make_effects(MOVED)
    drift.frame["mean_abs"] = float("nan")
    with pytest.raises(TableError, match="'mean_abs' was not measured"):
        drift_map(drift, measure="mean_abs")
    with pytest.raises(TableError, match="has no rows"):
        effect_panels(Effects(effects.frame.head(0), effects.origin))
