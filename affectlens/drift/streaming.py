"""Run the parts of a diff in disk order, over threads or over the workers of an executor.

Each thread has its own buffers, so memory is bounded by them and not by the size of tensors or
checkpoints. Sums of parts are merged in order, whichever thread is first. An interrupt stops at once.
"""

import itertools
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from affectlens.checkpoints import Checkpoint, open_checkpoint, pair
from affectlens.checkpoints.opening import opens_again
from affectlens.drift.blocks import Summing
from affectlens.drift.measures import Engine, Measure, Sums
from affectlens.drift.parts import Detail, Part, Strip, parts, strips
from affectlens.errors import CheckpointError
from affectlens.executing import Failed, execute
from affectlens.sites import Site

_MOST = 8  # threads: beyond this memory bandwidth is the limit, not the cores
_FAR = 4  # threads where a hub is read: they mostly wait for it
Tell = Callable[[int], Any]  # takes a number of bytes
Show = Callable[[Sequence[Any], str], Iterable[Any]]  # iterates over things under a progress bar


def engine() -> Engine:
    """Return the compiled engine, or torch's without numba or a processor that supports it."""
    from affectlens.drift import torch_engine

    try:
        from affectlens.drift import numba_engine
    except ImportError:
        return torch_engine
    return numba_engine if _converts_halves() else torch_engine


def stream(strips: Sequence[Strip], sums_of: Callable[[Part], Sums], *, tell: Tell) -> dict[Strip, Sums]:
    """Measure the sums of each strip; `tell` is called with the number of bytes read.

    Uses as many threads as torch (`torch.set_num_threads`, OMP_NUM_THREADS), but at most eight; four
    where a hub is read.
    """
    far = any(span.of.remote for strip in strips if not strip.unread for span in strip.spans or ())
    threads = _FAR if far else min(torch.get_num_threads(), _MOST)
    ordered = [part for strip in sorted(strips, key=lambda strip: strip.place) for part in parts(strip)]
    found = {strip: Sums() for strip in strips}
    for part, sums in zip(ordered, _run(sums_of, ordered, threads), strict=True):
        found[part.strip].merge(sums)
        tell(part.bytes)
    return found


@dataclass(frozen=True)
class Job:
    """The data a worker needs to measure some sites."""

    sources: tuple[str, ...]  # of base, tuned and, where there is one, the control
    alpha: float | None
    preset: str | None
    detail: str | Iterable[str] | None
    custom: Mapping[str, Measure]
    sites: tuple[Site, ...]


def spread(plan: list[Strip], jobs: list[Job], *, executor: Any, tell: Tell) -> dict[Strip, Sums]:
    """Measure the sums of each strip by the workers of an executor."""
    strips_of = {strip.site: strip for strip in plan}
    found: dict[Site, Sums] = {}
    with closing(execute(measured, jobs, executor=executor)) as outcomes:
        for job, outcome in outcomes:
            if isinstance(outcome, Failed):
                raise outcome.error
            found |= outcome
            tell(sum(strips_of[site].bytes for site in job.sites))
    return {strip: found[strip.site] for strip in plan}


def jobs(
    plan: list[Strip],
    sides: tuple[Checkpoint, ...],
    *,
    alpha: float | None,
    preset: str | None,
    detail: str | Iterable[str] | None,
    custom: Mapping[str, Measure],
) -> list[Job]:
    """Make a job for each file of base; raises `CheckpointError` for sides that a worker can't open."""
    for side in sides:
        if not side.store.source:
            reason = "is in memory, so the workers of an executor can't open it"
            raise CheckpointError(side.store.name, reason, fix="Give a path or a hub id")
        if not opens_again(side, sides[0], alpha=alpha, preset=preset):
            reason = "was opened with its own base or alpha, which a worker would not know"
            raise CheckpointError(side.store.name, reason, fix="Give its path, or leave executor= out")
    sources = tuple(side.store.source for side in sides)
    shards: dict[str, list[Site]] = defaultdict(list)
    for strip in plan:
        shards[strip.place[0]].append(strip.site)
    return [Job(sources, alpha, preset, detail, custom, tuple(sites)) for sites in shards.values()]


def measured(job: Job) -> dict[Site, Sums]:
    """Run a job in a worker: open the sides and measure the sums of its sites."""
    base = open_checkpoint(job.sources[0], preset=job.preset, alpha=job.alpha)
    opened = (open_checkpoint(s, base=base, preset=job.preset, alpha=job.alpha) for s in job.sources[1:])
    pairing, *others = (pair(base, side) for side in opened)  # names a part of a model as base does
    control, detail = others[0].tuned if others else None, Detail.of(job.detail, exact=bool(job.custom))
    plan = list(strips(pairing, control, detail=detail, only=job.sites))
    found = stream(plan, Summing(engine(), job.custom), tell=lambda _: None)
    return {strip.site: sums for strip, sums in found.items()}


def _converts_halves() -> bool:
    """Return whether the target processor converts float16 in hardware.

    If not, LLVM calls a library function that may be missing, and then ends the process.
    """
    from llvmlite import binding
    from numba.core import config

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if config.CPU_FEATURES is not None:
        return "+f16c" in config.CPU_FEATURES.split(",")
    return bool(binding.get_host_cpu_features().get("f16c"))


def _run(work: Callable[[Part], Sums], every: Iterable[Part], threads: int) -> Iterator[Sums]:
    if threads == 1:
        yield from map(work, every)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="affectlens")
    left = iter(every)
    try:
        # Keep few parts under way: an interrupt waits for them to end.
        ahead: list[Future[Sums]] = [pool.submit(work, part) for part in itertools.islice(left, 2 * threads)]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [pool.submit(work, part) for part in itertools.islice(left, 1)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
