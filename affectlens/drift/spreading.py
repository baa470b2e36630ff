"""Spread a diff over processes or machines: a job for each shard of base, carrying paths and sites.

A job opens the checkpoints again where it runs, and gives back sums; tensors never travel. The error of
one that fails wherever it is tried is raised: a drift that lacks sites is none.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from affectlens.checkpoints import Checkpoint, Pairing, open_checkpoint, pair
from affectlens.drift.planning import Detail, Strip, strips
from affectlens.drift.streaming import Tell, engine, stream
from affectlens.drift.summing import Measure, Summing
from affectlens.drift.sums import Sums
from affectlens.errors import CheckpointError
from affectlens.executing import Failed, execute
from affectlens.sites import Site, Sites


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
    """A job for each file of base; raises `CheckpointError` for sides that a worker can't open."""
    for side in sides:
        if not side.store.source:
            reason = "is in memory, so the workers of an executor can't open it"
            raise CheckpointError(side.store.name, reason, fix="Give a path or a hub id")
        if not opens_again(side, sides[0], alpha=alpha, preset=preset):
            reason = "was opened with a base or an alpha of its own, which a worker would not know"
            raise CheckpointError(side.store.name, reason, fix="Give its path, or leave executor= out")
    sources = tuple(side.store.source for side in sides)
    shards: dict[str, list[Site]] = defaultdict(list)
    for strip in plan:
        shards[strip.place[0]].append(strip.site)
    return [Job(sources, alpha, preset, detail, custom, tuple(sites)) for sites in shards.values()]


def opens_again(
    side: Checkpoint, base: Checkpoint, *, alpha: float | None = None, preset: str | None = None
) -> bool:
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
