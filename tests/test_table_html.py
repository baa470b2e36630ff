"""Tables in a notebook have bars behind numbers, dashes for unknown values, and nothing that runs."""

import re
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from affectlens import html, printable
from affectlens.drift.drift import Drift
from affectlens.table import SHOWN, Table


class Barred(Table):
    """A table with a bar for `far`."""

    bars: ClassVar[tuple[str, ...]] = ("far",)


def widths(drawn: str) -> list[float]:
    """Return the lengths of the bars, in percent of their cell."""
    return [float(found) for found in re.findall(r"left/([\d.]+)%", drawn)]


def test_a_bar_is_as_long_as_its_share_of_the_column_s_maximum() -> None:
    """The maximum is that of the whole table, although only the first rows are shown."""
    far = [1.0, 2.0, *[0.5] * SHOWN, 4.0]
    drawn = Barred(pd.DataFrame({"far": far, "other": far}))._repr_html_()

    assert [25.0, 50.0, *[12.5] * (SHOWN - 2)] == widths(drawn)


def test_the_number_stays_text() -> None:
    """The bar is the cell's background, so a screen reader reads the number."""
    drawn = Barred(pd.DataFrame({"far": [0.123456]}))._repr_html_()

    assert ">0.1235</td>" in drawn
    assert "<script" not in drawn


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 0.0, -1.0, pd.NA])
def test_what_has_no_length_has_no_bar(value: object) -> None:
    """Null, zero, infinite and negative values are written without a bar."""
    drawn = html.table(["far"], [[value]], most={"far": 2.0})

    assert [] == widths(drawn)
    assert f">{printable.cell(value)}</td>" in drawn


@pytest.mark.parametrize("column", [[None, None], [np.nan, np.nan], [0.0, 0.0], [-1.0, -2.0]])
def test_a_column_without_a_maximum_has_no_bars(column: list[object]) -> None:
    """Columns without a positive value have numbers alone."""
    assert [] == widths(Barred(pd.DataFrame({"far": column}))._repr_html_())


def test_null_is_a_dash_in_both_reprs() -> None:
    """An unknown value looks neither like zero nor like an empty cell, and is never 'nan'."""
    table = Table(pd.DataFrame({"a": [1.5, np.nan], "b": ["x", None]}))

    assert 2 == table._repr_html_().count(f">{printable.NULL}</td>")
    assert 2 == repr(table).count(printable.NULL)
    assert "nan" not in (repr(table) + table._repr_html_()).lower()


def test_arrays_are_not_printed() -> None:
    """A column of arrays is left out of both reprs."""
    frame = pd.DataFrame({"a": [1, 2], "values": [np.arange(4000.0), None]})
    table = Table(frame)

    assert "values" not in repr(table) + table._repr_html_()


def test_an_empty_table_shows_its_header() -> None:
    """A table without rows has a header and no bars."""
    assert "<th>far</th>" in Barred(pd.DataFrame({"far": []}))._repr_html_()


def test_names_from_files_are_escaped() -> None:
    """No header or cell can contain a tag."""
    drawn = Barred(pd.DataFrame({"<b>": ["<i>"], "far": ["<u>"]}).astype(object)[["<b>", "far"]][:0])
    text = html.table(["<b>", "far"], [["<i>", "<u>"]], most={"far": 1.0}) + drawn._repr_html_()

    assert not re.search("<[biu]>", text)


def test_drift_has_bars_where_it_shows_norms() -> None:
    """Every column with bars is shown."""
    assert ("relative", "rms", "frobenius") == Drift.bars
    assert set(Drift.bars) <= set(Drift.shown)
