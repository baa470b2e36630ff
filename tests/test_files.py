"""A file is written whole or not at all: full disks, places that can't be written, a process that dies."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from affectlens.errors import AffectlensError, WriteError
from affectlens.files import whole, write_text
from affectlens.table import Table
from affectlens.views import plot
from tests.views.conftest import drift

ROOT = Path(__file__).parent.parent
TABLE = Table(pd.DataFrame({"a": [1]}))

EARLIER = "what was there before"
KINDS = ("t.parquet", "t.csv", "t.json", "t.md", "t.tex", "report.html", "plot.html", "plot.json")
# Writes a file of each kind; the limit on file sizes simulates a full disk.
WRITING = """
import resource, sys
from pathlib import Path
from affectlens.errors import WriteError
from affectlens.views import Report, plot
from tests.views.conftest import drift
table, limit = drift(layers=40), int(sys.argv[1])
save = {"report": Report(table).save, "plot": plot(table).save, "t": table.save}
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for path in map(Path, sys.argv[2:]):
    try:
        save[path.stem](path)
    except WriteError as error:
        print(error)
"""
# Writes forever, a megabyte of one letter each time, in small pieces.
ENDLESS = """
import itertools, sys
from affectlens.files import whole
for letter in itertools.cycle("ab"):
    with whole(sys.argv[1]) as partial, open(partial, "w", buffering=1) as stream:
        for _ in range(1024):
            stream.write(letter * 1024)
            stream.flush()
    print(letter, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes there")
@pytest.mark.parametrize("limit", [0, 1000])
def test_a_full_disk_leaves_the_earlier_file(limit: int, tmp_path: Path) -> None:
    """For every kind of file the error names the path and the reason, and no partial file is left."""
    paths = [tmp_path / kind for kind in KINDS]
    for path in paths:
        path.write_text(EARLIER)
    command = [sys.executable, "-c", WRITING, str(limit), *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    expected = [f"{path}: can't be written (File too large)" for path in paths]
    assert (expected, "") == (run.stdout.splitlines(), run.stderr)
    assert {EARLIER} == {path.read_text() for path in paths}
    assert sorted(paths) == sorted(tmp_path.iterdir())


def test_an_image_that_can_not_be_written_has_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """plotly writes the bytes from kaleido, so its error is replaced."""

    def full(_figure: go.Figure, path: Path, **_options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space")

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "kaleido" or find(name))
    monkeypatch.setattr(go.Figure, "write_image", full)
    with pytest.raises(WriteError, match=r"p\.pdf: can't be written \(No space left on device\)"):
        plot(drift(layers=2)).save(tmp_path / "p.pdf")

    assert [] == list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_the_earlier_file(tmp_path: Path) -> None:
    """An error of any kind is raised unchanged, an interrupt too."""
    path = tmp_path / "t.txt"
    path.write_text(EARLIER)

    for error in (KeyError("x"), KeyboardInterrupt(), AffectlensError("ours")):
        with pytest.raises(type(error)), whole(path) as partial:  # noqa: PT012
            partial.write_text("half")
            raise error
    assert EARLIER == path.read_text()
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [lambda path: write_text(path, "x"), TABLE.save])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/t.csv", "Not a directory|File exists"),
        ("file/deeper/t.csv", "Not a directory"),
        ("folder/t.csv", "Is a directory"),
        (f"{'x' * 300}.csv", "File name too long"),
        (f"{'x' * 300}/t.csv", "File name too long"),
        ("closed/t.csv", "Permission denied"),
    ],
)
def test_a_place_that_can_not_be_written_is_named(
    place: str, reason: str, save: Callable[[Path], object], tmp_path: Path
) -> None:
    """The error names a file in place of a folder, a folder, a long name, a read-only folder."""
    (tmp_path / "file").write_text(EARLIER)
    (tmp_path / "folder" / "t.csv" / "inside").mkdir(parents=True)
    (tmp_path / "closed").mkdir(mode=0o500)
    if place.startswith("closed") and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("may write everywhere")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(WriteError, match=rf"{place[-20:]}: can't be written \(({reason})\)$") as caught:
        save(tmp_path / place)

    assert isinstance(caught.value, OSError)
    assert before == sorted(tmp_path.rglob("*"))


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    """The temporary name beside it is not longer."""
    write_text(tmp_path / f"{'x' * 251}.csv", "whole")

    assert ["whole"] == [path.read_text() for path in tmp_path.iterdir()]


def test_a_new_file_is_as_open_as_others(tmp_path: Path) -> None:
    """Its permissions follow the umask of the process."""
    (tmp_path / "plain.txt").write_text("x")
    write_text(tmp_path / "ours.txt", "x")

    assert (tmp_path / "plain.txt").stat().st_mode == (tmp_path / "ours.txt").stat().st_mode


def test_folders_are_made(tmp_path: Path) -> None:
    """Missing folders above the file are created."""
    write_text(tmp_path / "a" / "b" / "t.txt", "\ud800 and text")

    assert "? and text" == (tmp_path / "a" / "b" / "t.txt").read_text("utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("moment", [0.0, 0.003, 0.017, 0.041, 0.09, 0.21])
def test_a_killed_writer_leaves_a_whole_file(moment: float, tmp_path: Path) -> None:
    """At every moment the file is the earlier or the later one; a leftover beside it is hidden."""
    path = tmp_path / "t.txt"
    writer = subprocess.Popen([sys.executable, "-c", ENDLESS, path], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(moment)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()

    text = path.read_text()
    assert (1 << 20, 1) == (len(text), len(set(text)))
    assert [] == [other for other in tmp_path.iterdir() if other != path and not other.name.startswith(".")]


def test_only_ordinary_files_are_replaced(tmp_path: Path) -> None:
    """A pipe or a folder is refused; a link stays a link, and its target is written."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    for name, reason in (("pipe", "not an ordinary file"), ("folder", "Is a directory")):
        with pytest.raises(WriteError, match=reason):
            write_text(tmp_path / name, "new")
    write_text(tmp_path / "link.txt", "new")

    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link.txt").is_symlink()
    assert "new" == (tmp_path / "real.txt").read_text()
