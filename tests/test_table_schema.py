"""A saved table that is damaged or from a stranger: an error names the file and the place, or it works."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectlens.drift.drift import Drift
from affectlens.errors import TableError
from affectlens.table import Table
from affectlens.table_formats import MOST
from affectlens.table_schema import required
from affectlens.views import Report
from tests.views.conftest import drift, effects

BOUNDED = settings(max_examples=40, derandomize=True, deadline=None, database=None)
JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.sampled_from([-1, 0, 2**40, 2**70, 10**400, -2.5, 1e308, 1e-320]),
    st.text(max_size=4),
    st.sampled_from([[], [1], ["x"], {}, {"base": "x"}, {"base": None}, [{}], {"x": {}}]),
)  # fmt: skip
GOOD: dict[str, Table] = {
    "drift": drift(layers=1),
    "effects": effects({"gate_proj": 0.5, "up_proj": 0.2}, draws=2),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, one in inner for found in places(one, (*path, key))]


def changed(value: Any, path: tuple[Any, ...], junk: Any, *, gone: bool) -> None:
    """Put junk at a path, or delete what is there."""
    *most, last = path
    for key in most:
        value = value[key]
    if gone:
        del value[last]
    else:
        value[last] = junk


def told(kind: type[Table], path: Path) -> str:
    """Return the error for a file, without its name; nothing if the table can be shown."""
    try:
        found = kind.load(path)
        shown = (repr(found), found._repr_html_(), Report(found).html)
    except TableError as error:
        return str(error).removeprefix(f"{path}: ")
    return "" if all(shown) else "nothing is shown"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what can't be computed is null
@pytest.mark.parametrize("name", GOOD)
def test_random_damage_is_reported(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Junk anywhere in the rows, columns or origin of a table gives a `TableError`, or a report."""
    path = tmp_path_factory.mktemp("damaged") / "t.json"
    text = GOOD[name].save(path).read_text("ascii")
    parts = json.loads(text)
    del parts["schema"]
    where = {part: places(one, (part,)) for part, one in parts.items()}
    one = st.sampled_from(sorted(where)).flatmap(lambda part: st.sampled_from(where[part]))

    @BOUNDED
    @given(one, JUNK, st.booleans())
    def holds(place: tuple[Any, ...], junk: Any, gone: bool) -> None:
        damaged = json.loads(text)
        changed(damaged, place, junk, gone=gone)
        path.write_text(json.dumps(damaged))

        assert 3 > told(type(GOOD[name]), path).count("\n")

    holds()


COLUMNS: list[tuple[str, str, Any, str]] = [
    ("drift", "tower", "gone", "column 'tower' is missing"),
    ("drift", "targeted", "gone", "column 'targeted' is missing"),
    ("drift", "control_rms", "gone", "column 'control_rms' is missing"),
    ("drift", "frobenius", "x", "column 'frobenius' must hold numbers, but row 1 has 'x'"),
    ("drift", "frobenius", 10**30, f"column 'frobenius' must hold numbers, but row 1 has {10**30}"),
    ("drift", "frobenius", True, "column 'frobenius' must hold numbers, but row 1 has True"),
    ("drift", "size", None, "column 'size' must hold whole numbers from 0, but row 1 is null"),
    ("drift", "size", -1, "column 'size' must hold whole numbers from 0, but row 1 has -1"),
    ("drift", "layer", 0.5, "column 'layer' must hold whole numbers from 0, but row 1 has 0.5"),
    ("drift", "role", 1, "column 'role' must hold text, but row 1 has 1"),
    ("drift", "parameter", "\ud800", "column 'parameter' must hold text, but row 1 has '\\ud800'"),
    ("drift", "targeted", "no", "column 'targeted' must hold true or false, but row 1 has 'no'"),
    ("drift", "label", "\x1b", ""),
    ("drift", "another", "x", ""),
    ("effects", "metric", "gone", "column 'metric' is missing"),
    ("effects", "parameters", 0, ""),
    ("effects", "kind", None, "column 'kind' must hold text, but row 1 is null"),
    ("effects", "effect", [1], "column 'effect' must hold numbers, but row 1 has array([1.])"),
]  # fmt: skip
ORIGINS: list[tuple[str, Any, str]] = [
    ("drift", [], "this is not a table of affectlens (TypeError('its origin is not a mapping'))"),
    ("drift", {"sources": [1]}, "origin.sources must be a mapping, not [1]"),
    ("drift", {"sources": {"base": None}}, "origin.sources.base must be a mapping, not None"),
    ("drift", {"sources": {"base": "x"}}, "origin.sources.base must be a mapping, not 'x'"),
    ("drift", {"sources": {"base": {"parameters": "x"}}},
     "origin.sources.base.parameters must be a whole number or null, not 'x'"),
    ("drift", {"sources": {"\x1b": 1}}, "origin.sources.\ufffd must be a mapping, not 1"),
    ("drift", {"ledger": "x"}, "origin.ledger must be a list, not 'x'"),
    ("drift", {"ledger": None}, "origin.ledger must be a list, not None"),
    ("drift", {"ledger": [1]}, "origin.ledger[0] must be a mapping, not 1"),
    ("drift", {"ledger": [{"sites": 10**30}]},
     f"origin.ledger[0].sites must be a whole number or null, not {10**30}"),
    ("drift", {"sources": {"base": {"bytes": "x"}}},
     "origin.sources.base.bytes must be a number or null, not 'x'"),
    ("drift", {"command": 5}, "origin.command must be text or a list or null, not 5"),
    ("effects", {"tasks": {"emotion": {"fit": 5}}},
     "origin.tasks.emotion.fit must be true or false or null, not 5"),
    ("drift", {"versions": [1]}, "origin.versions must be a mapping, not [1]"),
    ("drift", {"findings": 5}, "origin.findings must be a list, not 5"),
    ("drift", {"findings": [5]}, "origin.findings[0] must be text, not 5"),
    ("drift", {"custom": ["role"]}, "column 'role' must hold numbers, but row 1 has 'q_proj'"),
    ("drift", {}, ""),
    ("drift", {"another": [1]}, ""),
    ("effects", {"tasks": None}, "origin.tasks must be a mapping, not None"),
    ("effects", {"tasks": {"emotion": "x"}}, "origin.tasks.emotion must be a mapping, not 'x'"),
    ("effects", {"failed": [1]}, "origin.failed[0] must be a mapping, not 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "junk", "expected"), COLUMNS)
def test_a_damaged_column_is_reported(
    name: str, column: str, junk: Any, expected: str, tmp_path: Path
) -> None:
    """The error names the file, the column, its type and the first row that has another."""
    path = GOOD[name].save(tmp_path / "t.json")
    parts = json.loads(path.read_text("ascii"))
    if junk == "gone":
        del parts["columns"][column]
    else:
        parts["columns"][column] = "object"
        parts["rows"][0][column] = junk
    parts["rows"] = [{key: row.get(key) for key in parts["columns"]} for row in parts["rows"]]
    path.write_text(json.dumps(parts), "ascii")

    assert expected == told(type(GOOD[name]), path)


@pytest.mark.parametrize(("name", "origin", "expected"), ORIGINS)
def test_a_damaged_origin_is_reported(name: str, origin: Any, expected: str, tmp_path: Path) -> None:
    """The error names the file, the entry and its type."""
    path = GOOD[name].save(tmp_path / "t.json")
    path.write_text(json.dumps({**json.loads(path.read_text("ascii")), "origin": origin}), "ascii")

    assert expected == told(type(GOOD[name]), path)


def test_two_columns_of_one_name_are_refused() -> None:
    """A selection by name would be ambiguous."""
    frame = pd.concat([GOOD["drift"].frame, GOOD["drift"].frame[["role"]]], axis=1)

    with pytest.raises(TableError, match=r"^two columns have the name role$"):
        required(frame, Drift.columns)


@pytest.mark.parametrize("column", [name for name in GOOD["drift"].frame if "control" not in name])
def test_a_parquet_without_a_column_is_refused(column: str, tmp_path: Path) -> None:
    """Every column is needed, in every format."""
    path = replace(GOOD["drift"], frame=GOOD["drift"].frame.drop(columns=column)).save(tmp_path / "t.parquet")

    assert f"column {column!r} is missing" == told(Drift, path)


def test_more_rows_than_fit_are_refused(tmp_path: Path) -> None:
    """Millions of equal cells are a small file, but would fill the memory."""
    path = Drift(pd.DataFrame({"size": np.zeros(MOST + 1, np.int8)})).save(tmp_path / "t.parquet")

    assert 1_000_000 > path.stat().st_size
    why = f"{MOST + 1:,} rows × 1 columns exceed {MOST:,} cells"
    expected = f"this is not a table of affectlens (ValueError('{why}'))"
    assert expected == told(Drift, path)


@pytest.mark.parametrize("broken", ["drift", "effects"])
def test_a_report_of_a_damaged_table_is_one_line(broken: str, tmp_path: Path) -> None:
    """The command ends with exit code 1, names the file and the place, and writes no report."""
    paths = {name: table.save(tmp_path / f"{name}.parquet") for name, table in GOOD.items()}
    table = GOOD[broken]
    replace(table, origin={**table.origin, "findings": 5}).save(paths[broken])
    command = [sys.executable, "-m", "affectlens", "report", *map(str, paths.values()), "-o", "r.html"]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    assert 1 == run.returncode
    assert f"{paths[broken].name}: origin.findings must be a list, not 5" in run.stderr.replace("\n", " ")
    assert 3 >= run.stderr.count("\n")
    assert not (tmp_path / "r.html").exists()
