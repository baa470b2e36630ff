"""Whatever its names contain, a saved table reads back bit for bit, and every format shows them as text."""

import csv
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite, TableError
from affectlens.table import Table, writable
from tests.evil_names import EVIL

READABLE = (".csv", ".json", ".parquet")
# Many quotes, separators and blanks, so that they meet. Half surrogate pairs can't be written.
SHARP = st.text("'\"=+-@\uff1d,;\t\r\n\0 \ufeff\u2028ab0", max_size=12)
NAMES = SHARP | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FLOATS = st.floats(allow_nan=True, allow_infinity=False)
ROWS = st.lists(st.tuples(NAMES, st.none() | NAMES, FLOATS, st.none() | st.integers(0, 2**62)), min_size=1)
BOUNDED = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def table_of(rows: list[tuple[str, str | None, float, int | None]], **origin: object) -> Table:
    """Make a table of names, names or nulls, numbers, and counts or nulls."""
    names, others, numbers, counts = zip(*rows, strict=True)
    frame = pd.DataFrame({"name": names, "other": others, "number": numbers})
    frame["count"] = pd.array(counts, dtype="Int64")
    return Table(frame, origin)


def evil_table() -> Table:
    """Make a table with an evil name in each row, in a column's name and in the origin."""
    frame = pd.DataFrame({"name": EVIL, "number": np.arange(len(EVIL)) / 3, EVIL[17]: "x"})
    return Table(frame, {"sources": {"base": {"name": list(EVIL)}}, "loss": -1.5})


@pytest.mark.parametrize("suffix", READABLE)
def test_every_name_reads_back(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Names, nulls and empty names, doubles to their last bit and counts beyond 2^53 are kept."""
    path = tmp_path_factory.mktemp("table") / f"table{suffix}"

    @BOUNDED
    @given(ROWS, NAMES)
    def holds(rows: list[tuple[str, str | None, float, int | None]], name: str) -> None:
        table = table_of(rows, source=name)
        found = Table.load(table.save(path))

        for column in ("name", "other", "count"):
            expected = [None if pd.isna(cell) else cell for cell in table.frame[column]]
            assert expected == [None if pd.isna(cell) else cell for cell in found.frame[column]]
        expected = table.frame["number"].to_numpy()
        np.testing.assert_array_equal(expected, found.frame["number"].to_numpy())
        assert list(np.signbit(expected)) == list(np.signbit(found.frame["number"].to_numpy()))
        assert table.origin == found.origin

    holds()


@pytest.mark.parametrize("suffix", READABLE)
def test_evil_names_read_back(suffix: str, tmp_path: Path) -> None:
    """Evil names survive in cells, as a column's name and in the origin."""
    table = evil_table()
    found = Table.load(table.save(tmp_path / f"table{suffix}"))

    pd.testing.assert_frame_equal(table.frame, found.frame, check_exact=True)
    assert table.origin == found.origin


@pytest.mark.parametrize("suffix", READABLE)
def test_kinds_of_columns_read_back(suffix: str, tmp_path: Path) -> None:
    """A table without rows keeps its columns, one with nulls keeps its types."""
    frame = pd.DataFrame({"a": ["1", None], "b": [True, False], "c": [1, 2**62], "d": [0.1, np.nan]})
    frame["e"] = pd.array([True, None], dtype="boolean")
    frame["f"] = pd.array([2**60 + 1, None], dtype="Int64")

    for part in (frame, frame[:0]):
        found = Table.load(Table(part).save(tmp_path / f"t{suffix}")).frame
        pd.testing.assert_frame_equal(part, found, check_dtype=len(part) > 0)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheet_finds_no_formula(separator: str, tmp_path: Path) -> None:
    """No cell of a CSV begins with a formula, not even in the head, whatever separator is expected."""
    csv.field_size_limit(10**7)
    text = evil_table().save(tmp_path / "table.csv").read_text("utf-8")
    cells = [cell for row in csv.reader(io.StringIO(text), delimiter=separator) for cell in row]
    numbers = [cell for cell in cells if re.fullmatch(r" ?-?[\d.]+[}\]]*", cell)]

    assert len(EVIL) <= len(cells) - len(numbers)
    for cell in (cell for cell in cells if cell not in numbers):
        assert not re.match(r"[\s\0\ufeff]*[=+\-@＝＋－＠]|[\t\r\n]", cell), cell


def test_a_quote_is_put_before_formulas_alone(tmp_path: Path) -> None:
    """Other names are written unchanged."""
    names = ["=1", "'=1", "a", "'a", "model.layers.0", "a-b", "a, b"]
    path = Table(pd.DataFrame({"name": names})).save(tmp_path / "table.csv")

    expected = ["'=1", "''=1", "a", "'a", "model.layers.0", "a-b", "a, b"]
    assert expected == list(pd.read_csv(path, skiprows=1)["name"])


def test_markdown_is_a_table_of_text(tmp_path: Path) -> None:
    """Each name is one row, without tags, links, images, code or additional cells."""
    lines = evil_table().save(tmp_path / "table.md").read_text("utf-8").split("\n")

    assert 2 + len(EVIL) + 1 == len(lines)
    for line in lines[:-1]:
        bare = re.sub(r"\\[\\`*\[\]|!~$]", "", line)
        assert not re.search(r"[<>`\[\]$!]", bare), line
        assert 3 + 1 == bare.count("|")


def test_latex_is_a_table_of_text(tmp_path: Path) -> None:
    """Each name is one row, without TeX commands or arguments of `\\\\` beside our own."""
    lines = evil_table().save(tmp_path / "table.tex").read_text("utf-8").split("\n")
    rows = lines[2:-3]

    assert ["\\bottomrule", "\\end{tabular}", ""] == lines[-3:]
    assert 2 + len(EVIL) == len(rows)
    for row in (row for row in rows if row != "\\midrule"):
        bare = re.sub(r"\\(text[a-z]+\{\}|[&%$#_{}])|\{[\[*]\}", "", row.removesuffix(" \\\\"))
        assert not re.search(r"[\\%$#_{}~^\[*]", bare), row
        assert 2 == bare.count("&")
        assert bare.isprintable()


def test_json_is_strict(tmp_path: Path) -> None:
    """The file is ASCII without NaN, and has each name."""
    text = evil_table().save(tmp_path / "table.json").read_text("ascii")

    assert list(EVIL) == [row["name"] for row in json.loads(text)["rows"]]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", b""),
        (".csv", b"a,b\n1,2\n"),
        (".csv", b"# {}\n"),
        (".csv", b"# [1]\n"),
        (".csv", b"\xff\xfe\0"),
        (".csv", b'# {"schema": "x", "origin": {}, "columns": {"a": "str"}}\n"a","b"\n1,2\n'),
        (".json", b"[]"),
        (".json", b"{"),
        (".json", b"[" * 200_000),
        (".json", b'{"rows": [1], "columns": 1}'),
        (".json", b'{"schema": "affectlens.table/1", "origin": [1], "columns": {}, "rows": []}'),
        (".parquet", b""),
        (".parquet", b"PAR1PAR1"),
        (".parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"),
    ],
)
def test_another_file_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    """A damaged or foreign file raises `TableError`, whatever its parser raises."""
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)

    with pytest.raises(TableError, match=r"table\.\w+: this is not a table of affectlens"):
        Table.load(path)


def test_what_can_not_be_loaded_is_named(tmp_path: Path) -> None:
    """A pipe would block forever; a missing file, another format and another class are errors too."""
    os.mkfifo(tmp_path / "table.csv")
    table = Table(pd.DataFrame({"a": [1]}))
    table.save(tmp_path / "table.json")
    table.save(tmp_path / "table.md")
    expected = {
        "table.csv": "not an ordinary file",
        "none.csv": "no such file",
        "table.md": "can't read '.md'. Kinds: .parquet, .csv, .json",
        "table.json": "this is affectlens.table/1, expected affectlens.drift/1",
    }

    for name, reason in expected.items():
        with pytest.raises(TableError, match=re.escape(f"{name}: {reason}") + "$"):
            Drift.load(tmp_path / name)


def test_what_can_not_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    """A format without a writer, a taken name, a file in place of the folder and a name that is too long."""
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    why = "can't be written: its folder is read-only or a file, or its name is taken or too long."

    for name in ("folder.csv", "file/t.csv", f"{'x' * 300}.csv"):
        with pytest.raises(TableError, match=re.escape(why)):
            writable(tmp_path / name)
    with pytest.raises(
        TableError, match=r"^t.xlsx: can't write '.xlsx'. Kinds: .parquet, .csv, .json, .md, .tex$"
    ):
        writable(tmp_path / "t.xlsx")
    assert tmp_path / "new" / "t.csv" == writable(tmp_path / "new" / "t.csv")


def test_a_selection_without_rows_names_the_values() -> None:
    """The error lists the values in their order; a column that is not there lists the columns."""
    table = Table(pd.DataFrame({"layer": [11, 2, None], "role": ["gate_proj", "up_proj", "up_proj"]}))

    with pytest.raises(NoSuchSite, match=r"^no row has role='gate'. Here: gate_proj, up_proj. Did you mean "):
        table.where(role="gate")
    with pytest.raises(NoSuchSite, match=r"^no row has layer=3. Here: 2.0, 11.0$"):
        table.where(layer=3)
    with pytest.raises(
        NoSuchSite, match=r"^no row has a layer that satisfies the function. Here: 2.0, 11.0$"
    ):
        table.where(layer=lambda layer: layer > 11)
    with pytest.raises(TableError, match=r"^no column 'rol'. Columns: layer, role. Did you mean 'role'\?$"):
        table.where(rol="gate")
    with pytest.raises(TableError, match=r"^the rows of Table are not sites: there is no column 'parameter'"):
        _ = table.sites
    arrays = Table(pd.DataFrame({"a": [np.arange(2.0)]}))
    with pytest.raises(
        TableError, match=r"^column 'a' has an array in each row, which can't be sorted or compared$"
    ):
        arrays.top(1, "a")
