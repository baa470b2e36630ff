"""Learning-rate schedule and CPU-second bookkeeping shared by the stages."""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path


def learning_rate(step: int, steps: int, warm: int = 20) -> float:
    """Return the factor of a linear warm-up followed by a cosine to 5 %."""
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextmanager
def timed(measured: dict, name: str):
    """Add the CPU seconds of the block to `measured['cpu_seconds'][name]`."""
    start = time.process_time()
    yield
    measured.setdefault("cpu_seconds", {})[name] = round(time.process_time() - start, 1)


def once(path: Path, make: Callable[[], None], measured: dict, name: str) -> None:
    """Run `make`, which writes `path`, unless it ran before; keep the time it really took."""
    note = path.with_suffix(".seconds")
    if not (path.exists() and note.exists()):
        start = time.process_time()
        make()
        note.write_text(str(round(time.process_time() - start, 1)))
    measured.setdefault("cpu_seconds", {})[name] = float(note.read_text())
