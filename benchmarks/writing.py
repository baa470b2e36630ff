"""Compare writing an edited checkpoint with copying its files: python -m benchmarks.writing [--size 3b]

A base and a tuning that moved its gates, random bf16 in the layout of a language model, in shards of 2 GB. In
turns, in this one run: `shutil.copyfile` of every file of the base, and `affectlens transplant` as a
separate process, interpreter and imports counted; neither waits for the disk at the end. Memory is RssAnon of
that process, sampled every 2 ms.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.diff.generating import LAYOUTS, generate, size
from benchmarks.diff.timing import spread

ROLES = {"gate": ["--role", "gate_proj"], "embedding": ["--role", "embed_tokens"], "all": []}
_EVERY = 0.002  # seconds
_IMPORTED = "from affectlens import writing; print(flush=True); input()"


class Run(NamedTuple):
    """Seconds by the clock and of the processor, and the peak of anonymous memory in MB."""

    wall: float
    cpu: float
    anonymous: float = 0.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="3b", choices=LAYOUTS)
    parser.add_argument("--folder", type=Path, help="where the pair is, or is made and kept")
    parser.add_argument("--what", nargs="*", default=["gate"], choices=ROLES)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _tell(asked.folder or Path(folder), asked.size, what=asked.what, repeats=asked.repeats)


def _tell(folder: Path, name: str, *, what: list[str], repeats: int) -> None:
    layout = LAYOUTS[name]
    generate(folder, layout, tunings=("all",))
    print(f"{name}: {size(layout) / 1e9:.2f} GB a side, {layout.layers} layers, {repeats} repeats")
    imports = _imports()
    runs: dict[str, list[Run]] = {one: [] for one in ("copy", *what)}
    out = folder / "out"
    for repeat in range(repeats):
        for one in list(runs)[:: -1 if repeat % 2 else 1]:
            for side in ("all", "base"):
                _warmed(folder / side)
            words = [str(folder / "base"), str(folder / "all"), *ROLES.get(one, []), "-o", str(out)]
            runs[one].append(_copied(folder / "base", out) if one == "copy" else transplanted(words))
            shutil.rmtree(out)
            os.sync()  # what is still to be written must not fall on the next
    print("| what | wall s | CPU s | speed of a copy | anonymous MB | over imports |")
    print("| --- | --- | --- | --- | --- | --- |")
    for one, found in runs.items():
        speeds = [copy.wall / run.wall for copy, run in zip(runs["copy"], found, strict=True)]
        most = max(run.anonymous for run in found)
        memory = f"{most:.0f} | {most - imports:.0f}" if most else " | "
        times = f"{spread([run.wall for run in found])} | {spread([run.cpu for run in found])}"
        print(f"| {one} | {times} | {spread(speeds)} | {memory} |")


def _warmed(folder: Path) -> None:
    """Make the system cache the files as far as it can, so that no contestant reads for the others."""
    for file in sorted(folder.iterdir()):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def _copied(base: Path, out: Path) -> Run:
    out.mkdir()
    wall, cpu = time.perf_counter(), time.process_time()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, out / file.name)
    return Run(time.perf_counter() - wall, time.process_time() - cpu)


def transplanted(words: list[str]) -> Run:
    """Run `affectlens transplant` and watch it."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    most = _watched(
        [sys.executable, "-m", "affectlens", "transplant", *words], lambda process: process.communicate()
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(time.perf_counter() - wall, cpu, most)


def _imports() -> float:
    """Return the MB of a process that only imports the writing code."""

    def ended(process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(10 * _EVERY)
        process.communicate(b"\n")

    return _watched([sys.executable, "-c", _IMPORTED], ended)


def _watched(command: list[str], until: Callable[["subprocess.Popen[bytes]"], object]) -> float:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    most, over = 0.0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(_EVERY):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            match = re.search(r"RssAnon:\s+(\d+) kB", status)
            most = max(most, int(match[1]) / 1000 if match else 0.0)

    watcher = threading.Thread(target=look)
    watcher.start()
    until(process)
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return most


if __name__ == "__main__":
    main()
