"""Files that an earlier version wrote still load, with the same numbers, and a sweep goes on from them.

`data/written_before/write_files.py` wrote them with commit e6ee4aa, before the modules were moved.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import affectlens as al
from affectlens import table
from affectlens.table import Table
from affectlens.table_formats import records

OLD = Path(__file__).parent / "data" / "written_before"
SETTINGS = json.loads((OLD / "settings.json").read_text("utf-8"))
TABLES: tuple[tuple[type[Table], str, int], ...] = (
    (al.Drift, "drift.parquet", 8),
    (al.Drift, "drift.csv", 8),
    (al.Drift, "drift.json", 8),
    (al.Trajectory, "trajectory.parquet", 2),
    (al.Agreement, "agreement.json", 7),
    (al.Scores, "scores.csv", 24),
    (al.Effects, "effects.parquet", 14),
)
ARRAYS = ["unit_frobenius", "unit_base_norm"]  # left out of a CSV
# Sums of float32 squares in another order: n·ε of the largest tensor is 3e-3, what is met in practice 1e-7.
SUMS = 1e-5
# A quantile of 2,000 resamples of margins that range over about 20; one resample more on one side.
DRAWS = 0.02


@pytest.fixture(scope="module")
def task(demo: al.Demo) -> al.Task:
    """Every fifth sentence, as it was judged then."""
    whole = demo.task("sentences")
    return replace(whole, examples=whole.examples[::5])


@pytest.mark.parametrize(("kind", "name", "rows"), TABLES, ids=[name for _, name, _ in TABLES])
def test_tables_load(kind: type[Table], name: str, rows: int) -> None:
    """Each class reads its old files, rows and origin alike, and shows them."""
    found = kind.load(OLD / name)

    assert rows == len(found)
    assert "0.1.0" == found.origin["versions"]["affectlens"]
    assert type(found).__name__ in repr(found)


@pytest.mark.parametrize("name", ["drift.csv", "drift.json"])
def test_every_form_holds_the_same_drift(name: str) -> None:
    """CSV and JSON kept every digit of what Parquet holds."""
    expected, found = (al.Drift.load(OLD / one) for one in ("drift.parquet", name))
    gone = ARRAYS if name.endswith(".csv") else []

    assert records(expected.frame.drop(columns=gone)) == records(found.frame)
    assert expected.origin == found.origin


def test_the_drift_is_the_one_measured_today(demo: al.Demo) -> None:
    """A diff of the same checkpoints gives the rows of the old file."""
    expected = al.Drift.load(OLD / "drift.parquet")
    drift = al.diff(demo.base, demo.tuned, control=demo.control, detail="heads", progress=False)
    found = drift.where(tower="language", layer=(0, 1), role=("gate_proj", "q_proj", "norm"))

    pd.testing.assert_frame_equal(
        objects(expected.frame), objects(found.frame[list(expected.frame)]), rtol=SUMS
    )
    assert expected.sites == found.sites
    assert expected.origin["sources"] == found.origin["sources"]
    assert expected.origin["ledger"] == found.origin["ledger"]


def test_the_scores_are_the_ones_given_today(lens: al.Lens, task: al.Task) -> None:
    """The same model gives the same answers, with margins that differ by rounding alone."""
    expected = al.Scores.load(OLD / "scores.csv").frame
    found = al.evaluate(lens, task).frame

    names = ["id", "cluster", "label", "prediction", "correct"]
    pd.testing.assert_frame_equal(expected[names], found[names], check_dtype=False)
    assert pytest.approx(expected["margin"].tolist(), abs=1e-3) == found["margin"].tolist()


@pytest.fixture
def same_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answer as the packages did when the journal was written: other versions have other keys, rightly."""
    monkeypatch.setattr(table, "version", SETTINGS["versions"].__getitem__)
    table.versions.cache_clear()
    yield
    table.versions.cache_clear()


@pytest.mark.usefixtures("same_versions")
def test_a_sweep_goes_on_from_an_old_journal(
    demo: al.Demo, lens: al.Lens, task: al.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every result is found under its key: the model never runs, and the table is that of the old version."""
    shutil.copy(OLD / "sweep.journal", tmp_path / "sweep.journal")
    monkeypatch.setattr(type(lens.model), "forward", _never)
    monkeypatch.setattr(type(lens.model.config), "to_json_string", lambda self: SETTINGS["config"])
    gates = demo.base.sites.where(tower="language", role="gate_proj", layer=(0, 1))
    grid = al.Grid(gates, by="layer", actions=("transplant", "revert", "zero"), donor=demo.tuned, n_random=0)

    found = al.sweep(lens, grid, task, journal=tmp_path / "sweep.journal", progress=False)

    expected = al.Effects.load(OLD / "effects.parquet").frame
    spread = ["low", "high", "effect_low", "effect_high"]
    others = [name for name in expected if name not in spread]
    pd.testing.assert_frame_equal(objects(expected[others]), objects(found.frame[others]), rtol=1e-9)
    pd.testing.assert_frame_equal(expected[spread], found.frame[spread], rtol=0, atol=DRAWS)


def objects(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cells without the types of their columns: one null has many forms, by the file it was in."""
    return frame.astype(object).where(frame.notna(), None)


def _never(*args: Any, **others: Any) -> None:
    raise AssertionError("the model ran, so a result was not found in the journal")
