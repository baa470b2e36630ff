"""Eight processes can share one cache and one journal, and leave no broken entry."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

import affectlens as al
from tests.small_models import nudge, tiny

PROCESSES = 8
# Imports once and forks: no process has compiled anything, and all of them start at the same moment.
PROGRAM = """
import json, os, sys
import affectlens as al
from affectlens.drift import numba_engine

def run(name):
    child = os.fork()
    if not child:
        drift = al.diff(*sys.argv[2:], progress=False)
        hits = sum(numba_engine.measure.stats.cache_hits.values())
        with open(name, "w") as file:
            json.dump([drift.frame["frobenius"].tolist(), hits], file)
        os._exit(0)
    return child

os.chdir(sys.argv[1])
codes = [os.waitpid(child, 0)[1] for child in [run(f"{number}.json") for number in range(PROCESSES)]]
print([*codes, os.waitpid(run("last.json"), 0)[1]])
"""


def test_eight_processes_compile_into_one_cache(save: Callable[..., Path], tmp_path: Path) -> None:
    """Processes that start with an empty cache agree; a ninth loads the kernel from the cache."""
    pair = [
        str(save(model, name))
        for name, model in (("base", tiny("llama")), ("tuned", nudge(tiny("llama"), "")))
    ]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    program = PROGRAM.replace("PROCESSES", str(PROCESSES))
    command = [sys.executable, "-c", program, str(tmp_path), *pair]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)

    assert (0, "") == (run.returncode, run.stderr)
    assert [0] * (PROCESSES + 1) == json.loads(run.stdout)
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(PROCESSES)]
    norms, hits = json.loads((tmp_path / "last.json").read_text())
    assert [norms] * PROCESSES == [one for one, _ in found]
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
