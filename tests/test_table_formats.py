"""Whatever a name holds, a saved table reads back bit for bit, and no form takes it for more than text."""

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

from affectlens.errors import TableError
from affectlens.table import Table
from tests.evil_names import EVIL

READABLE = (".csv", ".json", ".parquet")
# What quotes, separators and blanks are made of, so that they meet; half of a surrogate pair is no text.
SHARP = st.text("'\"=+-@\uff1d,;\t\r\n\0 \ufeff\u2028ab0", max_size=12)
NAMES = SHARP | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FLOATS = st.floats(allow_nan=True, allow_infinity=False)
ROWS = st.lists(st.tuples(NAMES, st.none() | NAMES, FLOATS, st.none() | st.integers(0, 2**62)), min_size=1)
BOUNDED = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def table_of(rows: list[tuple[str, str | None, float, int | None]], **origin: object) -> Table:
    """A table of names, names that may be null, numbers, and counts that may be null."""
    names, others, numbers, counts = zip(*rows, strict=True)
    frame = pd.DataFrame({"name": names, "other": others, "number": numbers})
    frame["count"] = pd.array(counts, dtype="Int64")
    return Table(frame, origin)


def evil_table() -> Table:
    """One row a name, which stands in every column of words, in a column's name and in the origin."""
    frame = pd.DataFrame({"name": EVIL, "number": np.arange(len(EVIL)) / 3, EVIL[17]: "x"})
    return Table(frame, {"sources": {"base": {"name": list(EVIL)}}, "loss": -1.5})


@pytest.mark.parametrize("suffix", READABLE)
def test_every_name_reads_back(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Names, nulls beside empty names, doubles to their last bit and counts beyond 2^53."""
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
    """Each in a cell, one as a column, all in the origin."""
    table = evil_table()
    found = Table.load(table.save(tmp_path / f"table{suffix}"))

    pd.testing.assert_frame_equal(table.frame, found.frame, check_exact=True)
    assert table.origin == found.origin


@pytest.mark.parametrize("suffix", READABLE)
def test_kinds_of_columns_read_back(suffix: str, tmp_path: Path) -> None:
    """A table without rows keeps its columns, and one with nulls its types."""
    frame = pd.DataFrame({"a": ["1", None], "b": [True, False], "c": [1, 2**62], "d": [0.1, np.nan]})
    frame["e"] = pd.array([True, None], dtype="boolean")
    frame["f"] = pd.array([2**60 + 1, None], dtype="Int64")

    for part in (frame, frame[:0]):
        found = Table.load(Table(part).save(tmp_path / f"t{suffix}")).frame
        pd.testing.assert_frame_equal(part, found, check_dtype=len(part) > 0)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheet_finds_no_formula(separator: str, tmp_path: Path) -> None:
    """No cell of a CSV begins with one, head and header too, whichever separator the spreadsheet takes."""
    csv.field_size_limit(10**7)
    text = evil_table().save(tmp_path / "table.csv").read_text("utf-8")
    cells = [cell for row in csv.reader(io.StringIO(text), delimiter=separator) for cell in row]
    numbers = [cell for cell in cells if re.fullmatch(r" ?-?[\d.]+[}\]]*", cell)]

    assert len(EVIL) <= len(cells) - len(numbers)
    for cell in (cell for cell in cells if cell not in numbers):
        assert not re.match(r"[\s\0\ufeff]*[=+\-@＝＋－＠]|[\t\r\n]", cell), cell


def test_a_quote_is_put_before_formulas_alone(tmp_path: Path) -> None:
    """Other names are in the file as they are."""
    names = ["=1", "'=1", "a", "'a", "model.layers.0", "a-b", "a, b"]
    path = Table(pd.DataFrame({"name": names})).save(tmp_path / "table.csv")

    expected = ["'=1", "''=1", "a", "'a", "model.layers.0", "a-b", "a, b"]
    assert expected == list(pd.read_csv(path, skiprows=1)["name"])


def test_markdown_is_a_table_of_text(tmp_path: Path) -> None:
    """A row a name, no tag, link, image, code or cell more than there are columns."""
    lines = evil_table().save(tmp_path / "table.md").read_text("utf-8").split("\n")

    assert 2 + len(EVIL) + 1 == len(lines)
    for line in lines[:-1]:
        bare = re.sub(r"\\[\\`*\[\]|!~$]", "", line)
        assert not re.search(r"[<>`\[\]$!]", bare), line
        assert 3 + 1 == bare.count("|")


def test_latex_is_a_table_of_text(tmp_path: Path) -> None:
    """A row a name; outside of our own commands nothing is special to TeX, nor an argument of `\\\\`."""
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
    """ASCII, no NaN, and not longer than the names."""
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
def test_what_is_no_table_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    """A damaged or foreign file is told of, whatever its parser makes of it."""
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)

    with pytest.raises(TableError, match=r"table\.\w+: this is not a table of affectlens"):
        Table.load(path)


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    """It would be waited for, for ever."""
    os.mkfifo(tmp_path / "table.csv")
    for name, reason in (("table.csv", "not an ordinary file"), ("none.csv", "no such file")):
        with pytest.raises(TableError, match=f"{name}: {reason}"):
            Table.load(tmp_path / name)
