"""Time contestants in turns, so that other work of the machine slows all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, of this process's CPU time and of the clock."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def interleaved(contestants: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, Timing]:
    """Run each contestant once a repeat, every other repeat in reverse order."""
    found = {name: Timing() for name in contestants}
    gc.collect()
    gc.freeze()  # else the garbage collector walks through all of transformers, in whoever's time
    try:
        for repeat in range(repeats):
            for name in list(contestants)[:: -1 if repeat % 2 else 1]:
                _time(contestants[name], found[name])
    finally:
        gc.unfreeze()
    return found


def _time(contestant: Callable[[], Any], timing: Timing) -> None:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    result = contestant()
    timing.wall.append(time.perf_counter() - wall)
    timing.cpu.append(time.process_time() - cpu)
    del result  # what it holds must not lie beside the next contestant


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Divide the times of `one` by those of `other`, repeat by repeat."""
    return [a / b for a, b in zip(one, other, strict=True)]


def spread(values: Sequence[float], unit: str = "") -> str:
    """Return the median, the minimum and the maximum."""
    middle, low, high = (f"{value:.3g}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit} [{low}, {high}]"
