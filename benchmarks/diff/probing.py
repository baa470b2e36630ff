"""Run one diff in a separate interpreter: time to compile, and rise of memory.

    python -m benchmarks.diff.probing BASE TUNED

Prints JSON. Memory counts only the process's own: `RssAnon` and, because Python's anonymous maps are
shared ones, `RssShmem`; files that are read are in neither.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_EVERY = 0.002  # seconds
_THREADS = 2


def probe(base: Path, tuned: Path, *, cache: Path) -> dict[str, float]:
    """Run this module on a pair, with compiled code kept in the folder `cache`."""
    command = [sys.executable, "-m", "benchmarks.diff.probing", str(base), str(tuned)]
    root = Path(__file__).parents[2]
    beside = {"NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=root, env=os.environ | beside, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(run.stdout)
    return found


def main() -> None:
    """Print seconds until the engine has run once, and the rise in bytes (null except on Linux)."""
    import numpy as np
    import torch

    from affectlens.drift.diffing import diff
    from affectlens.drift.streaming import engine

    torch.set_num_threads(_THREADS)
    start = time.perf_counter()
    words, sums = np.zeros(2048, np.uint32), np.zeros(8)
    engine().measure((words, words + np.uint32(1)), sums)
    compiled = time.perf_counter() - start
    engine().still(words, sums)
    before, peak = _memory(), _Peak()
    with peak:
        diff(*sys.argv[1:], progress=False)
    print(json.dumps({"compiled": compiled, "rise": peak.bytes - before if before else None}))


class _Peak:
    """The peak of memory in a block, sampled by a thread every few milliseconds."""

    def __init__(self) -> None:
        self.bytes, self._done = _memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *failure: Any) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, _memory())

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self.bytes = max(self.bytes, _memory())


def _memory() -> int:
    if not _STATUS.exists():
        return 0
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:")) * 1024


if __name__ == "__main__":
    main()
