"""Frames beside a result print all of their columns, whatever the width of the terminal."""

import pickle

import numpy as np
import pandas as pd
import pytest

import affectlens as al
from affectlens.printable import NULL
from affectlens.table_frames import WholeFrame

NOTE = "stored on one side, tied to the input embedding on the other: not compared"
ROW = {"state": "tied", "sites": 1, "base_parameters": 693_760, "tuned_parameters": None, "note": NOTE}
FRAME = WholeFrame([ROW])


@pytest.mark.parametrize("width", [20, 60, 80, 100, 300])
def test_every_column_and_word_is_printed(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last column is wrapped, and its lines stay below each other."""
    monkeypatch.setenv("COLUMNS", str(width))
    header, *lines = repr(FRAME).splitlines()
    start = header.index("note")

    assert ["state", "sites", "base_parameters", "tuned_parameters", "note"] == header.split()
    assert ["tied", "1", "693,760", NULL] == lines[0][:start].split()
    assert NOTE == " ".join(line[start:].strip() for line in lines)
    assert max(map(len, lines)) <= max(width, start + 24)


def test_the_ledger_of_a_diff_is_printed_whole(demo: al.Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 characters pandas would leave out columns and cut the notes."""
    monkeypatch.setenv("COLUMNS", "80")
    ledger = al.diff(demo.base, demo.tuned, progress=False).ledger
    printed = repr(ledger)

    assert "…" not in printed
    assert "..." not in printed
    for name in ledger.columns:
        assert name in printed
    words = printed.split()
    for note in ledger["note"]:
        assert set(note.split()) <= set(words)


def test_it_is_a_pandas_frame() -> None:
    """Selections and aggregations of it are ordinary frames."""
    assert isinstance(FRAME, pd.DataFrame)
    assert pd.DataFrame is type(FRAME.set_index("state"))
    assert 1 == FRAME.set_index("state").loc["tied", "sites"]


def test_long_frames_and_empty_ones() -> None:
    """Sixty rows are shown, the others are counted; without rows the header is left."""
    long = WholeFrame({"a": np.arange(100)})

    assert "… 40 more rows" == repr(long).splitlines()[-1]
    assert "60 of 100 rows" in long._repr_html_()
    assert "a  b" == repr(WholeFrame(columns=["a", "b"]))
    assert "" == repr(WholeFrame())


def test_names_from_files_can_not_forge_a_line() -> None:
    """Control characters are replaced in a print, tags are escaped in a notebook."""
    evil = WholeFrame({"<b>": ["one\x1b[31m\r\ntwo"], "note": ["a\u2028b <i>"]})

    assert 2 == len(repr(evil).splitlines())
    assert "\x1b" not in repr(evil)
    assert "<b>" not in evil._repr_html_()
    assert "<i>" not in evil._repr_html_()


def test_a_title_and_the_named_columns_are_printed() -> None:
    """The others are listed below; what is made of the frame is an ordinary one, with all columns."""
    found = WholeFrame.of(pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4], "c": "x"}), "Of <b>", shown=["a", "c"])
    found.bars = ["a"]

    assert repr(found).splitlines() == ["Of <b>", "a  c", "1  x", "2  x", "more columns: b"]
    assert "Of &lt;b&gt;" in found._repr_html_()
    assert "left/50% 68%" in found._repr_html_()
    assert list(found.columns) == ["a", "b", "c"]
    assert type(found.head(1)) is type(found[["b"]]) is pd.DataFrame
    assert found.equals(pickle.loads(pickle.dumps(found)))


def test_groups_and_contrasts_show_themselves(demo: al.Demo) -> None:
    """With their sources, and without columns that say nothing."""
    drift = al.diff(demo.base, demo.tuned, control=demo.control, progress=False)
    first, header, *_ = repr(drift.by("role")).splitlines()

    assert first == "Drift by role, base → tuned (control: control)"
    assert header.split()[:5] == ["role", "sites", "relative", "rms", "frobenius"]
    assert repr(drift.contrast("gate_proj", "up_proj")).startswith("gate_proj against up_proj, base → tuned")
    assert "28 of 113 sites moved" in drift.summary
    assert len(drift.head(2)) == 2
    rows = list(drift)
    assert [row["parameter"] for row in rows] == drift.frame["parameter"].tolist()
    assert rows[0]["layer"] is None
