"""Eight processes can share one cache and one journal, and leave no broken entry."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

import affectlens as al
from tests.conftest import nudge, tiny

PROCESSES = 8
PROGRAM = """
import json, sys
import affectlens as al
from affectlens.drift import numba_engine

drift = al.diff(*sys.argv[1:], progress=False)
stats = numba_engine.measure.stats
print(json.dumps([drift.frame["frobenius"].tolist(), sum(stats.cache_hits.values())]))
"""


def test_eight_processes_compile_into_one_cache(save: Callable[..., Path], tmp_path: Path) -> None:
    """Processes that start with an empty cache agree; a ninth loads the kernel from the cache."""
    pair = [
        str(save(model, name))
        for name, model in (("base", tiny("llama")), ("tuned", nudge(tiny("llama"), "")))
    ]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *pair],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    ended = [(*run.communicate(timeout=300), run.returncode) for run in [start() for _ in range(PROCESSES)]]
    out, errors, code = (*(ninth := start()).communicate(timeout=60), ninth.returncode)

    assert [("", 0)] * PROCESSES == [(errors, code) for _, errors, code in ended]
    assert ("", 0) == (errors, code)
    norms, hits = json.loads(out)
    assert [norms] * PROCESSES == [json.loads(printed)[0] for printed, _, _ in ended]
    assert hits > 0


def test_eight_sweeps_write_into_one_journal(lens: al.Lens, demo: al.Demo, tmp_path: Path) -> None:
    """Each sweep returns the same table, and no entry of the journal is broken."""
    task = demo.task("faces-unseen").head(6)
    grid = al.Grid(demo.base.sites, donor=demo.tuned, n_random=2)
    expected = al.sweep(lens, grid, task, progress=False).frame
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if not child:
            try:
                found = al.sweep(lens, grid, task, journal=tmp_path / "sweep", progress=False)
                found.save(tmp_path / f"{number}.parquet")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    tables = [al.Effects.load(tmp_path / f"{number}.parquet").frame for number in range(PROCESSES)]

    for table in tables:
        pd.testing.assert_frame_equal(expected, table, check_exact=True)
    again = al.sweep(lens, grid, task, journal=tmp_path / "sweep", progress=False)
    pd.testing.assert_frame_equal(expected, again.frame, check_exact=True)


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import affectlens as al

print(len(al.diff(*sys.argv[1:], progress=False)))
"""


def test_a_cache_that_can_not_be_written_stops_no_diff(save: Callable[..., Path], tmp_path: Path) -> None:
    """On a full disk the kernel is compiled and used, but not stored."""
    pair = [str(save(tiny("llama"), "base")), str(save(nudge(tiny("llama"), ""), "tuned"))]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FULL, *pair]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    assert (0, "") == (run.returncode, run.stderr)
    assert int(run.stdout) > 0
    assert [] == [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
