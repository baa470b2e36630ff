"""Make the table: each ratio of `diff`, its aim, and whether it is reached."""

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from affectlens.drift.blocks import BLOCK
from affectlens.drift.streaming import engine
from benchmarks.diff import contestants, lora
from benchmarks.diff.accuracy import worst
from benchmarks.diff.generating import LAYOUTS, LONG, generate, size
from benchmarks.diff.probing import probe
from benchmarks.diff.timing import Timing, interleaved, ratios, spread

_LARGE = 1 << 24  # bytes of a read, the engine's own size beside it
_PAIRS = {"all": "all changed", "gate": "gate only"}
_LORA = {"small": (256, 128)}  # out and in; of the gate of a 7B model otherwise
_SHARE = 0.6  # of the memory that is free may be taken by two loaded models


class Row(NamedTuple):
    """A line of the table."""

    what: str
    measured: str
    wall: str = ""
    reach: str = ""
    reached: bool | None = None


class Timings(NamedTuple):
    """The times measured on one pair, and the bytes of both sides."""

    found: dict[str, Timing]
    bytes: int

    @property
    def floor(self) -> Timing:
        """Return the faster of the two floors, repeat by repeat."""
        one, other = self.found["floor 1"], self.found["floor 16"]
        cpu, wall = (list(map(min, *pair)) for pair in ((one.cpu, other.cpu), (one.wall, other.wall)))
        return Timing(cpu, wall)


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate, measure and print."""
    parser = argparse.ArgumentParser("benchmarks.diff")
    parser.add_argument("--size", choices=list(LAYOUTS), default="0.5b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "affectlens-benchmark")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        smoke = asked.size == "small"  # so few bytes say nothing of speed
        title = f"`--size {asked.size} --repeats {asked.repeats}`: median [least, most]"
        print(_machine(), title, sep="\n\n", end="\n\n")
        print("| what | measured | wall clock | to reach | reached |", "|---|---|---|---|---|", sep="\n")
        for row in rows(asked.size, asked.folder, repeats=asked.repeats):
            answer = {True: "yes", False: "**no**", None: ""}[None if smoke else row.reached]
            print("|", " | ".join((*row[:4], answer)), "|", flush=True)
    finally:
        torch.set_num_threads(threads)


def rows(name: str, folder: Path, *, repeats: int) -> Iterator[Row]:
    """Yield each line as soon as it is measured."""
    small, pair, long = folder / "small", folder / name, folder / "long"
    generate(small, LAYOUTS["small"], tunings=tuple(_PAIRS))
    generate(pair, LAYOUTS[name], tunings=tuple(_PAIRS))
    total = 2 * size(LAYOUTS[name])
    _timed(small, repeats=1, total=0)  # the kernel is compiled and every import done
    timed = {tuning: _timed(pair, tuning, repeats=repeats, total=total) for tuning in _PAIRS}
    for tuning, timings in timed.items():
        yield from _speed(timings, _PAIRS[tuning])
    yield from _between(pair, repeats)
    with tempfile.TemporaryDirectory() as cache:
        yield from _apart((small / "base", small / "all"), (pair / "base", pair / "all"), Path(cache))
    checked = [(pair, tuning) for tuning in _PAIRS]
    if name != "small":
        generate(long, LONG, tunings=("patches",))
        checked.append((long, "patches"))
    yield from _errors(checked)
    yield from _factors(_LORA.get(name, (18_944, 3584)), max(repeats, 3))


def _timed(pair: Path, tuning: str = "all", *, repeats: int, total: int) -> Timings:
    sides = pair / "base", pair / tuning
    calls: dict[str, Callable[[], object]] = {
        "floor 1": partial(contestants.floor, *sides, block=BLOCK),
        "floor 16": partial(contestants.floor, *sides, block=_LARGE),
        "opened": partial(contestants.opened, *sides),
        "ours": partial(contestants.ours, *sides),
        "measures": partial(contestants.measures, *sides),
        "loop": partial(contestants.loop, *sides),
    }
    if tuning == "all" and total <= _SHARE * _available():
        calls["loaded"] = partial(contestants.loaded, *sides)
    calls["floor 16"]()  # what fits into the page cache is there
    return Timings(interleaved(calls, repeats=repeats), total)


def _speed(timings: Timings, pair: str) -> Iterator[Row]:
    found, least = timings.found, timings.floor
    for name, what in (("1", "read floor, 1 MiB"), ("16", "read floor, 16 MiB"), ("ours", "diff")):
        timing = found["ours" if name == "ours" else f"floor {name}"]
        cpu, wall = ([timings.bytes / 1e9 / value for value in each] for each in (timing.cpu, timing.wall))
        yield Row(f"{what}, {pair}", spread(cpu, " GB/CPU-s"), spread(wall, " GB/s"))
    yield _ratio(f"diff / read floor, {pair}", found["ours"], least, most=2)
    yield _ratio(f"of these, opening by names, {pair}", found["opened"], least)
    aims = {"measures": ("the same measures over safe_open", 25), "loop": ("a loop for two norms", 5)}
    for name, (what, aim) in (aims | {"loaded": ("from_pretrained and the loop", 15)}).items():
        if name in found:
            yield _ratio(f"{what} / diff, {pair}", found[name], found["ours"], least=aim)
        elif pair == _PAIRS["all"]:
            yield Row(f"{what} / diff, {pair}", "not measured: too little memory")


def _ratio(
    what: str, one: Timing, other: Timing, *, least: float | None = None, most: float | None = None
) -> Row:
    cpu = ratios(one.cpu, other.cpu)
    middle = statistics.median(cpu)
    reached = middle >= least if least is not None else middle <= most if most is not None else None
    reach = f"≥ {least}×" if least is not None else f"≤ {most}×" if most is not None else ""
    return Row(what, spread(cpu, "×"), spread(ratios(one.wall, other.wall), "×"), reach, reached)


def _between(pair: Path, repeats: int) -> Iterator[Row]:
    """Compare the kinds of tuning, and two threads with one, in separate turns."""
    base = pair / "base"
    calls = {tuning: partial(contestants.ours, base, pair / tuning) for tuning in _PAIRS}
    found = interleaved(calls, repeats=repeats)
    yield _ratio("diff, gate only / all changed", found["gate"], found["all"], most=1)
    what = "diff, one thread / two"
    if _cores() < 2:
        yield Row(what, "not measured: one CPU")
        return

    def threaded(count: int) -> None:
        torch.set_num_threads(count)
        calls["all"]()

    try:
        found = interleaved({"1": partial(threaded, 1), "2": partial(threaded, 2)}, repeats=repeats)
    finally:
        torch.set_num_threads(1)
    wall = ratios(found["1"].wall, found["2"].wall)
    cpu = ratios(found["1"].cpu, found["2"].cpu)
    yield Row(what, spread(cpu, "×"), spread(wall, "×"), "≥ 1.7× wall", statistics.median(wall) >= 1.7)


def _apart(small: tuple[Path, Path], pair: tuple[Path, Path], cache: Path) -> Iterator[Row]:
    """Yield the rows that need a separate interpreter."""
    first, later = probe(*small, cache=cache), probe(*pair, cache=cache)
    yield Row("engine, first use of an installation (compiles)", "", f"{first['compiled']:.2g} s")
    yield Row("engine, first use in a process", "", f"{later['compiled']:.2g} s")
    if later["rise"] is not None:
        rise = later["rise"] / 1e6
        yield Row("anonymous memory over imports, two threads", f"{rise:.0f} MB", "", "< 150 MB", rise < 150)


def _errors(pairs: Sequence[tuple[Path, str]]) -> Iterator[Row]:
    errors = [worst(pair / "base", pair / tuning) for pair, tuning in pairs]
    for measure in ("frobenius", "base_norm"):
        most = max(error[measure] for error in errors)
        yield Row(f"worst relative error of {measure}", f"{most:.2g}", "", "≤ 1e-6", most <= 1e-6)


def _factors(shape: tuple[int, int], repeats: int) -> Iterator[Row]:
    for rank, aim in ((16, 100), (64, 30)):
        found = interleaved(lora.contestants(rank, shape), repeats=repeats)
        for kind, least in (("norm", aim), ("rows", 100)):
            what = f"LoRA r={rank}, {kind}: B·A made / from factors"
            yield _ratio(what, found[f"{kind} made"], found[f"{kind} from factors"], least=least)


def _machine() -> str:
    """Describe the processor and the versions without naming the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    try:
        numba = f"numba {version('numba')}"
    except ImportError:
        numba = "no numba"
    model = models[0] if models else platform.machine()
    return (
        f"{model}, {_cores()} cores; Python {platform.python_version()}, torch {version('torch')}, {numba}, "
        f"transformers {version('transformers')}; engine: {engine().__name__.rpartition('.')[2]}"
    )


def _cores() -> int:
    """Count the cores that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available() -> int:
    """Return the bytes of available memory; 0 where unknown."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
