"""Scores and their metrics: each metric is one row of METRICS, known by hand."""

import subprocess
import sys

import numpy as np
import pytest

import affectlens as al
from affectlens.errors import TableError
from affectlens.tasks import METRICS
from affectlens.tasks.scores import Metric, margin

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
