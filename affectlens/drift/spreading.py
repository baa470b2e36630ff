"""Spread a diff over processes or machines: a job for each shard of base, carrying paths and sites.

A job opens the checkpoints again where it runs, and gives back sums; tensors never travel. One that
fails is given out twice more before its error is raised.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from affectlens.checkpoints import Checkpoint, Pairing, open_checkpoint, pair
from affectlens.drift.planning import Detail, Strip, strips
from affectlens.drift.streaming import Tell, engine, stream
from affectlens.drift.summing import Measure, Summing
from affectlens.drift.sums import Sums
from affectlens.errors import CheckpointError
from affectlens.sites import Site, Sites

_TRIES = 3


@dataclass(frozen=True)
class Job:
    """What a worker needs to measure some sites."""

    sources: tuple[str, ...]  # of base, tuned and, where there is one, the control
    alpha: float | None
    preset: str | None
    detail: str | Iterable[str] | None
    custom: Mapping[str, Measure]
    sites: tuple[Site, ...]


def spread(plan: list[Strip], jobs: list[Job], *, executor: Any, tell: Tell) -> dict[Strip, Sums]:
    """The sums of each strip, measured by the executor's workers."""
    strips_of = {strip.site: strip for strip in plan}
    found: dict[Site, Sums] = {}
    waiting = [(job, 1, executor.submit(measured, job)) for job in jobs]
    try:
        while waiting:
            job, tries, future = waiting.pop(0)
            try:
                found |= future.result()
            except Exception:
                if tries == _TRIES:
                    raise
                waiting.append((job, tries + 1, executor.submit(measured, job)))
                continue
            tell(sum(strips_of[site].bytes for site in job.sites))
    finally:
        for _, _, future in waiting:  # of an error or an interrupt; else there are none
            future.cancel()
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
    """A job for each file of base; raises `CheckpointError` for sides that a worker can't open."""
    for side in sides:
        if not side.store.source:
            reason = "is in memory, so the workers of an executor can't open it"
            raise CheckpointError(side.store.name, reason, fix="Give a path or a hub id")
        if not _opens_again(side, sides[0], alpha=alpha, preset=preset):
            reason = "was opened with a base or an alpha of its own, which a worker would not know"
            raise CheckpointError(side.store.name, reason, fix="Give its path, or leave executor= out")
    sources = tuple(side.store.source for side in sides)
    shards: dict[str, list[Site]] = defaultdict(list)
    for strip in plan:
        shards[strip.place[0]].append(strip.site)
    return [Job(sources, alpha, preset, detail, custom, tuple(sites)) for sites in shards.values()]


def _opens_again(side: Checkpoint, base: Checkpoint, *, alpha: float | None, preset: str | None) -> bool:
    """Whether a worker, which knows the sources alone, sees an adapter as it is seen here."""
    if side.change is None or side.change.base.store.source == side.store.source:
        return True
    root = base.change.base if base.change else base
    if side is base or side.change.base.store.source != root.store.source:
        return False
    again = open_checkpoint(side.store.source, base=base, alpha=alpha, preset=preset)
    return all(again.factors[site].scale == known.scale for site, known in side.factors.items())


def measured(job: Job) -> dict[Site, Sums]:
    """What a worker does."""
    base = open_checkpoint(job.sources[0], preset=job.preset, alpha=job.alpha)
    opened = (open_checkpoint(s, base=base, preset=job.preset, alpha=job.alpha) for s in job.sources[1:])
    tuned, *control = (pair(base, side).tuned for side in opened)  # a part of a model is read beside base
    pairing = Pairing(base, tuned, Sites(job.sites), Sites(()), Sites(()), Sites(()))
    plan = list(
        strips(pairing, control[0] if control else None, detail=Detail.of(job.detail, exact=bool(job.custom)))
    )
    found = stream(plan, Summing(engine(), job.custom), tell=lambda _: None)
    return {strip.site: sums for strip, sums in found.items()}
