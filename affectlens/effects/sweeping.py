"""Run a grid: one model in memory, weights swapped by pointer, every effect paired by example.

Grid ── units ──▶ JudgingJob per unit, base and tuned ── judging.collect ──▶ Scores
     ── effects.compare with base or tuned ──▶ the rows of Effects
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from affectlens.checkpoints import Checkpoint, Pairing, open_checkpoint, pair
from affectlens.checkpoints.slicing import same_bits
from affectlens.effects.effects import Effects, compare
from affectlens.effects.estimating import measured
from affectlens.effects.evaluating import PreparedTask, describe, prepare_task, to_scores
from affectlens.effects.grid import Grid, GridUnit
from affectlens.effects.judging import Answers, JudgingJob, SweepContext, WeightChange, collect
from affectlens.effects.prompting import asked_as, describe_prompts
from affectlens.errors import NothingToCompare, TaskError
from affectlens.executing import Failed
from affectlens.lens import Lens
from affectlens.lens.live import remark
from affectlens.progress import SECONDS, say
from affectlens.sites import Site, Sites
from affectlens.table import provenance
from affectlens.tasks import Scores, Task

_COLUMNS = (
    "action", "sites", "parameters", "task", "metric", "baseline", "value", "low", "high",
    "effect", "effect_low", "effect_high", "recovered", "n", "seed", "kind", "null_of",
)  # fmt: skip


def sweep(
    lens: Lens,
    grid: Grid,
    tasks: Task | Sequence[Task],
    *,
    batch_size: int = 64,
    executor: Any = None,
    journal: str | Path | None = None,
    progress: bool = True,
    prompt_of: str = "base",
) -> Effects:
    """Apply every intervention of a grid to the base model in `lens` and judge each model by every task.

    Draws of the null are judged by affective tasks only. `prompt_of` is whose chat template asks all models,
    `"base"` or `"tuned"`.

    - `journal`: a file (or a folder) where each result is kept at once. The same sweep resumes from it and
      ends in the same table
    - `executor`: anything with `submit`, or a function that makes one (`affectlens.executing.processes(4)`).
      Base and donors must then be paths or hub ids, since workers open them again

    An intervention that fails (after up to three tries) is left out and listed in `Effects.failed`; the
    others finish.

    Raises `NothingToCompare` when the donor equals base, `TaskError` for two tasks of one name, `LensError`
    and `TaskError` as `evaluate` does, `JournalError` for a file that is not a journal or can't be written.

    >>> import affectlens as al
    >>> base, tuned, *_, tasks = al.load_demo()
    >>> lens = al.load(base, dtype="float32")
    >>> gates = base.sites.where(tower="language", role="gate_proj")
    >>> effects = al.sweep(lens, al.Grid(gates, donor=tuned, n_random=0), tasks[0].head(8), progress=False)
    >>> effects.where(kind="effect", metric="margin").frame[["action", "sites", "n"]].values.tolist()
    [['transplant', 'gate_proj', 8], ['revert', 'gate_proj', 8]]
    """
    asked = [tasks] if isinstance(tasks, Task) else list(tasks)
    _check_names(asked)
    swept = _prepare(lens, grid)
    form = asked_as(lens, prompt_of, tuned=swept.tuned).prompt_format
    prepared = {task.name: prepare_task(lens, task, batch_size=batch_size, form=form) for task in asked}
    base, tuned = JudgingJob((), tuple(prepared)), JudgingJob(swept.whole, tuple(prepared))
    jobs = {unit: JudgingJob(swept.steps(unit), _judges(unit, asked)) for unit in swept.units()}
    context = SweepContext(lens, swept.donors, dict(prepared))
    judged, failed = collect(
        context,
        (base, tuned, *jobs.values()),
        needed=(base, tuned),
        executor=executor,
        journal=journal,
        begin=partial(_tell_estimate, context) if progress else None,
    )
    known = {job: _scores(found, asked) for job, found in judged.items()}
    ends = known[base], known[tuned]
    done = [(unit, known[job]) for unit, job in jobs.items() if job in known]
    rows = [row for unit, found in done for row in _rows(unit, found, ends=ends, size=swept.size(unit))]
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    frame["seed"] = frame["seed"].astype("Int64")  # nullable: only draws have one
    lost = [_failure(unit, failed[job]) for unit, job in jobs.items() if job in failed]
    return Effects(frame, swept.origin(list(prepared.values()), lost) | {"prompt_of": prompt_of})


def _tell_estimate(context: SweepContext, jobs: Collection[JudgingJob]) -> None:
    found = measured(context, jobs) if jobs else None
    if found is not None and found.seconds > SECONDS:
        say(f"sweep: {found}")


def _judges(unit: GridUnit, tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return the names of the tasks that judge a unit: draws of the null need only the affective ones."""
    return tuple(task.name for task in tasks if unit.kind != "random-control" or task.role == "affective")


def _scores(found: Answers, tasks: Sequence[Task]) -> dict[str, Scores]:
    return {
        task.name: to_scores(task, torch.from_numpy(found[task.name])) for task in tasks if task.name in found
    }


def _failure(unit: GridUnit, failed: Failed) -> dict[str, Any]:
    why = f"{type(failed.error).__name__}: {failed.error}"
    return {"action": unit.action, "sites": unit.name, "kind": unit.kind, "tries": failed.tries, "why": why}


@dataclass(frozen=True)
class _Sweep:
    """The base lens, the opened donors, and the sites where they differ from base."""

    lens: Lens
    grid: Grid
    tuned: Checkpoint
    moved: Sites
    control: Checkpoint | None
    control_moved: Sites
    unlike: tuple[str, ...]

    @property
    def donors(self) -> dict[str, Checkpoint]:
        """The donors by name."""
        return {"tuned": self.tuned, **({} if self.control is None else {"control": self.control})}

    def units(self) -> Iterator[GridUnit]:
        """Yield all interventions, the whole changes of tuned and control first."""
        yield GridUnit("transplant", "all", self.moved, kind="reference")
        shared = None
        if self.control is not None:
            shared = pair(self.lens.checkpoint, self.control).comparable
            if self.control_moved:
                yield GridUnit("transplant", "all", self.control_moved, kind="control-tuning")
        yield from self.grid.units(self.moved, self.lens.checkpoint, control=shared)

    @property
    def whole(self) -> tuple[WeightChange, ...]:
        """The change from base to the tuned model: all sites that moved."""
        return (WeightChange(self.moved, "tuned"),)

    def steps(self, unit: GridUnit) -> tuple[WeightChange, ...]:
        """Return the changes that turn base into the unit's model."""
        if unit.action == "transplant":
            return (WeightChange(unit.sites, "control" if unit.kind == "control-tuning" else "tuned"),)
        if unit.action == "zero":
            return (*self.whole, WeightChange(unit.sites))
        # A revert is tuned with base's weights at these sites: base with all other changes of tuned.
        kept = self.moved - unit.sites
        return (WeightChange(kept, "tuned"),) if kept else ()

    def size(self, unit: GridUnit) -> int:
        """Return the number of parameters that a unit changes."""
        return sum(self.lens.checkpoint.storage[site].size for site in unit.sites)

    def origin(self, prepared: Sequence[PreparedTask], lost: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the origin of the result: sources, versions, settings and findings."""
        sources = {"base": (self.lens.source or self.lens.checkpoint).identity}
        sources |= {name: donor.identity for name, donor in self.donors.items()}
        note = "The reference is base with all comparable weights of tuned, not the tuned model itself: "
        uneven = [words for one in prepared if (words := _unequal_labels(one))]
        return {
            "sources": sources,
            **provenance(),
            **({"remote_code": dict(self.lens.remote_code)} if self.lens.remote_code else {}),
            "seed": self.grid.seed,
            "n_random": self.grid.n_random,
            "device": str(self.lens.device),
            "dtype": self.lens.checkpoint.identity["dtype"],
            "tasks": {one.task.name: describe(one.task) for one in prepared},
            "prompts": {one.task.name: describe_prompts(one.form, one.task) for one in prepared},
            "failed": lost,
            "findings": [
                *([_incomplete(lost)] if lost else []),
                *(note + words for words in self.unlike),
                *uneven,
            ],
        }


def _incomplete(lost: Sequence[Mapping[str, Any]]) -> str:
    first = lost[0]
    return (
        f"{len(lost)} interventions failed and have no rows here; the first is {first['action']} of "
        f"{first['sites']} ({first['why']})."
    )


def _prepare(lens: Lens, grid: Grid) -> _Sweep:
    # Opened here, once: a Transplant that is given a path reads the headers each time.
    root = lens.source or lens.checkpoint
    tuned = open_checkpoint(grid.donor, base=root)
    control = None if grid.control is None else open_checkpoint(grid.control, base=root)
    moved = _changed_sites(lens, tuned)
    if not moved:
        raise NothingToCompare(
            f"{tuned.store.name} equals the base in every weight, so there is nothing to transplant"
        )
    control_moved = Sites(()) if control is None else _changed_sites(lens, control)
    unlike = pair(root, tuned).unlike
    for words in unlike:
        remark(lens, words)
    return _Sweep(lens, grid, tuned, moved, control, control_moved, unlike)


def _changed_sites(lens: Lens, donor: Checkpoint) -> Sites:
    """Return the sites where a donor differs from base, compared in the dtype of the live model."""
    # A change that rounding to the live dtype removes would change nothing in the live model.
    pairing = pair(lens.checkpoint, donor)
    return Sites(site for site in pairing.comparable if not _same(pairing, site))


def _same(pairing: Pairing, site: Site) -> bool:
    """Return whether a donor has the same values at a site, in an embedding for the same tokens."""
    live = pairing.base.read(site).cpu()
    donor = pairing.tuned.read(site).to(live.dtype).cpu()
    if site in pairing.matched:
        ours, theirs = (torch.from_numpy(rows) for rows in pairing.matched[site])
        live, donor = live[ours], donor[theirs]
    return same_bits(live, donor)


def _unequal_labels(prepared: PreparedTask) -> str:
    """Return a sentence if the labels of a task differ in length: longer ones are less probable."""
    lengths = sorted({len(ids) for row in prepared.by_row for ids in row})
    if len(lengths) < 2:
        return ""
    return (
        f"The labels of {prepared.task.name} have {lengths[0]} to {lengths[-1]} tokens, whose "
        "log-probabilities are summed, so longer labels are at a disadvantage."
    )


def _check_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    if not names:
        raise TaskError("a sweep needs at least one task")
    for name in names:
        if names.count(name) > 1:
            fix = "load_task(…, name=…), or --task NAME:KIND=FILE"
            raise TaskError(f"two tasks are called {name!r}. Give each its own name: {fix}")


def _rows(
    unit: GridUnit, scores: Mapping[str, Scores], *, ends: tuple[Mapping[str, Scores], ...], size: int
) -> Iterator[dict[str, Any]]:
    base, tuned = ends
    for task, found in scores.items():
        start = base[task] if unit.action == "transplant" else tuned[task]
        named = {"action": unit.action, "sites": unit.name, "parameters": size, "task": task}
        about = {"n": len(found), "seed": unit.seed, "kind": unit.kind, "null_of": unit.null_of}
        for row in compare(found, start, gain=(base[task], tuned[task])):
            yield {**named, **row, **about}
