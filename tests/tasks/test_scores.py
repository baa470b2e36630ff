"""Scores and their metrics: each metric is one row of METRICS, known by hand."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import affectlens as al
from affectlens.errors import TableError
from affectlens.stats.intervals import bootstrap, wilson
from affectlens.tasks import METRICS
from affectlens.tasks.scores import Metric, Scores, correct, margin

LIGHT = """
import sys
from affectlens.tasks import Task, load_task, read_answer
print([name for name in ("torch", "pandas", "PIL", "av") if name in sys.modules])
from affectlens.tasks import open_film, open_picture, open_sound
print([name for name in ("torch", "av") if name in sys.modules])
"""


def test_margins_known_by_hand() -> None:
    """Gold less the best of the others: positive where the answer is right."""
    logps = np.array([[-1.0, -3.0, -2.0], [-1.0, -3.0, -2.0]])

    assert [1.0, -2.0] == margin(logps, np.array([0, 1])).tolist()


def test_a_tie_is_worth_its_share() -> None:
    """Of k labels that tie for the most probable, gold is one with a chance of 1/k; its margin is 0."""
    logps = np.array(
        [[-1.0, -1.0, -1.0, -2.0], [-1.0, -1.0, -3.0, -2.0], [-1.0, -1.0, -3.0, -2.0], [-1, -2, -2, -2]]
    )
    gold = np.array([2, 1, 3, 1])

    assert [1 / 3, 1 / 2, 0, 0] == correct(logps, gold).tolist()
    assert [0.0, 0.0, -1.0, -1.0] == margin(logps, gold).tolist()
    order = [3, 1, 0, 2]  # the order of the labels changes nothing
    moved = np.array([order.index(label) for label in gold])
    assert correct(logps, gold).tolist() == correct(logps[:, order], moved).tolist()


def test_labels_tie_to_the_last_bit_alone() -> None:
    """The nearest other float64 is no tie."""
    logps = np.array([[-1.0, np.nextafter(-1.0, 0)], [-1.0, np.nextafter(-1.0, -2)]])

    assert [0.0, 1.0] == correct(logps, np.array([0, 0])).tolist()


def test_accuracy_with_ties_has_the_interval_of_clusters() -> None:
    """Score intervals count successes; shares of ties are resampled by cluster."""
    clusters = np.repeat(np.arange(20), 3)
    drawn = np.random.default_rng(0)
    whole = drawn.integers(0, 2, 60).astype(float)
    tied = np.where(np.arange(60) % 7 == 0, 0.5, whole)
    metric = METRICS["accuracy"]

    assert bootstrap(tied, clusters) == metric.interval(tied, clusters)
    assert bootstrap(tied - whole, clusters) == metric.change(tied, whole, clusters=clusters)
    assert bootstrap(whole - tied, clusters) == metric.change(whole, tied, clusters=clusters)
    alone = np.arange(60)
    assert wilson(whole.sum(), 60) == metric.interval(whole, alone)
    rows = {"id": [str(n) for n in alone], "cluster": clusters.astype(str), "correct": tied}
    assert tied.mean() == Scores(pd.DataFrame(rows)).metric("accuracy").value


def test_a_metric_is_one_row(lens: al.Lens, demo: al.Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of METRICS alone brings a metric into scores, sweeps and their intervals."""
    monkeypatch.setitem(METRICS, "gold", Metric("gold", of=lambda logps, gold: np.exp(logps)[:, 0]))  # type: ignore[arg-type]
    task = demo.task("faces-unseen").head(8)
    scores = al.evaluate(lens, task)
    gates = demo.base.sites.where(tower="language", role="gate_proj")
    effects = al.sweep(lens, al.Grid(gates, donor=demo.tuned, n_random=0), task, progress=False)

    assert ("accuracy", "margin", "gold") == scores.metrics
    assert scores.values("gold").mean() == pytest.approx(scores.metric("gold").value)
    rows = effects.where(metric="gold", kind="effect", action="transplant").frame
    assert [scores.values("gold").mean()] == pytest.approx(rows["baseline"].tolist(), abs=1e-5)


def test_an_unknown_metric_names_those_there_are(lens: al.Lens, demo: al.Demo) -> None:
    """Greedy answers have no margin."""
    scores = al.evaluate(lens, demo.task("faces-unseen").head(4), answer="greedy", max_new_tokens=1)

    with pytest.raises(TableError, match=r"these scores have no 'margin'\. Metrics: accuracy"):
        scores.metric("margin")


def test_reading_a_task_loads_no_heavy_package() -> None:
    """A task needs neither torch, pandas nor Pillow; its media need neither torch nor av."""
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)

    assert ["[]", "[]"] == run.stdout.splitlines()
