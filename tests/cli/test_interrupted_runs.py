"""The command line killed or interrupted for real, then run again to the uninterrupted table."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

import affectlens as al

HOME = Path(al.__file__).parent / "demo"
PAIR = (str(HOME / "base"), str(HOME / "tuned"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a sweep of ten seconds, without its output."""
    lines = (HOME / "tasks" / "sentences.jsonl").read_text("utf-8").splitlines()
    few = tmp_path_factory.mktemp("task") / "few.jsonl"
    few.write_text("\n".join(lines[::4]), "utf-8")
    return ["sweep", *PAIR, "--task", f"labels={few}", "--n-random", "8", "--dtype", "float32"]


@pytest.fixture(scope="module")
def unbroken(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("unbroken") / "effects.parquet"
    _, told = (run := start(words, out)).communicate(timeout=300)
    assert (0, []) == (run.returncode, without_progress(told))
    return al.Effects.load(out).frame


def start(words: list[str], out: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "affectlens", *words, "-o", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def without_progress(told: str) -> list[str]:
    return [line for line in told.splitlines() if not line.startswith("sweep: ")]


def wait_for(journal: Path, rows: int) -> None:
    """Wait until so many results are kept."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if journal.exists() and kept(journal) >= rows:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {rows} results in {journal} after two minutes")


def kept(journal: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as rows:
            return int(rows.execute("SELECT count(*) FROM judged").fetchone()[0])
    except sqlite3.Error:  # it is being made
        return 0


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for orphans in /proc")
@pytest.mark.parametrize(("sent", "workers"), [(signal.SIGKILL, 0), (signal.SIGINT, 2)])
def test_a_sweep_goes_on(
    sent: signal.Signals,
    workers: int,
    words: list[str],
    unbroken: pd.DataFrame,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Killed, or interrupted with two workers, it ends within 5 s; a rerun completes the table."""
    out, journal = tmp_path / "effects.parquet", tmp_path / "effects.parquet.journal"
    more = ("--workers", str(workers)) if workers else ()
    run = start(words, out, *more)
    wait_for(journal, 5)
    started = children(run.pid)
    run.send_signal(sent)
    before = time.monotonic()
    _, told = run.communicate(timeout=60)
    seconds = time.monotonic() - before
    there = kept(journal)

    assert (130 if sent == signal.SIGINT else -signal.SIGKILL) == run.returncode
    assert seconds < 5
    words_of_it = without_progress(told)
    if sent == signal.SIGINT:
        assert "interrupted" == words_of_it[0]
        if len(words_of_it) > 1:  # unless it had to be ended
            assert words_of_it[1].endswith(f"are kept in {journal}; the same sweep goes on from there")
            assert words_of_it[2].startswith("Go on with: affectlens sweep ")
    else:
        assert not words_of_it
    assert not out.exists()
    assert [] == [pid for pid in started if alive(pid)]

    _, told = (again := start(words, out)).communicate(timeout=300)
    assert (0, []) == (again.returncode, without_progress(told))
    assert there > 0
    record_property(f"seconds until `affectlens sweep` ends after {sent.name}", round(seconds, 2))
    assert not journal.exists()
    pd.testing.assert_frame_equal(unbroken, al.Effects.load(out).frame, check_exact=True)


def alive(pid: int) -> bool:
    """Return whether a process still runs two seconds later."""
    until = time.monotonic() + 2
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False
