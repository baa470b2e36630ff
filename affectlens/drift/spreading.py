"""Spread a diff over processes or machines: a job for each shard of base, carrying paths and sites.

A job opens the checkpoints again where it runs, and gives back sums; tensors never travel. One that
fails is given out twice more before its error is raised.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from affectlens.checkpoints import Checkpoint, Pairing, open_checkpoint
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
    detail: str | None
    custom: Mapping[str, Measure]
    sites: tuple[Site, ...]


def spread(plan: list[Strip], jobs: list[Job], *, executor: Any, tell: Tell) -> dict[Strip, Sums]:
    """The sums of each strip, measured by the executor's workers."""
    strips_of = {strip.site: strip for strip in plan}
    found: dict[Site, Sums] = {}
    waiting = [(job, 1, executor.submit(measured, job)) for job in jobs]
    while waiting:
        job, tries, future = waiting.pop(0)
        try:
            found |= future.result()
        except Exception:
            if tries == _TRIES:
                for _, _, other in waiting:
                    other.cancel()
                raise
            waiting.append((job, tries + 1, executor.submit(measured, job)))
            continue
        tell(sum(strips_of[site].bytes for site in job.sites))
    return {strip: found[strip.site] for strip in plan}


def jobs(
    plan: list[Strip],
    sides: tuple[Checkpoint, ...],
    *,
    alpha: float | None,
    preset: str | None,
    detail: str | None,
    custom: Mapping[str, Measure],
) -> list[Job]:
    """A job for each file of base; raises `CheckpointError` for sides that a worker can't open."""
    for side in sides:
        if not side.store.source:
            reason = "is in memory, so the workers of an executor can't open it"
            raise CheckpointError(side.store.name, reason, fix="Give a path or a hub id")
    sources = tuple(side.store.source for side in sides)
    shards: dict[str, list[Site]] = defaultdict(list)
    for strip in plan:
        shards[strip.place[0]].append(strip.site)
    return [Job(sources, alpha, preset, detail, custom, tuple(sites)) for sites in shards.values()]


def measured(job: Job) -> dict[Site, Sums]:
    """What a worker does."""
    base = open_checkpoint(job.sources[0], preset=job.preset, alpha=job.alpha)
    others = [open_checkpoint(s, base=base, preset=job.preset, alpha=job.alpha) for s in job.sources[1:]]
    only = Sites(job.sites)
    pairing = Pairing(base, others[0], only, Sites(()), Sites(()), Sites(()))
    plan = list(strips(pairing, others[1] if len(others) > 1 else None, detail=Detail.of(job.detail)))
    found = stream(plan, Summing(engine(), job.custom), tell=lambda _: None)
    return {strip.site: sums for strip, sums in found.items()}
