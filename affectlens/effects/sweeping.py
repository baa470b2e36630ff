"""Run a grid: one model in memory, weights swapped by pointer, every effect paired by example."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tqdm import tqdm

from affectlens.checkpoints import Checkpoint, open_checkpoint, pair
from affectlens.drift.measuring import same_bits
from affectlens.effects.comparing import compare
from affectlens.effects.effects import Effects
from affectlens.effects.evaluating import Prepared, describe, label_logps, prepare_task, to_scores
from affectlens.effects.grid import Grid, Unit
from affectlens.errors import NothingToCompare, TaskError
from affectlens.interventions import Transplant, Zero
from affectlens.lens import Intervention, Lens, remembering_senses
from affectlens.sites import Sites
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
    progress: bool = True,
) -> Effects:
    """Apply every intervention of a grid to the base model in `lens` and judge it by every task.

    Draws of the null are judged by affective tasks only. Raises `NothingToCompare` when the donor
    equals base, `TaskError` for two tasks of one name, `LensError` and `TaskError` as `evaluate` does.
    """
    asked = [tasks] if isinstance(tasks, Task) else list(tasks)
    _check_names(asked)
    swept = _prepare(lens, grid)
    prepared = [prepare_task(lens, task, batch_size=batch_size) for task in asked]
    units = list(swept.units())
    changed = Sites(site for unit in units for site in unit.sites)
    rows: list[dict[str, Any]] = []
    with remembering_senses(lens.model, lens.checkpoint, changed=changed):
        base = swept.scores(prepared)
        tuned = swept.scores(prepared, *swept.whole)
        for unit in tqdm(units, unit="intervention", disable=None if progress else True, leave=False):
            judges = [
                one for one in prepared if unit.kind != "random-control" or one.task.role == "affective"
            ]
            found = swept.scores(judges, *swept.interventions(unit))
            for name, scores in found.items():
                start = base[name] if unit.action == "transplant" else tuned[name]
                compared = compare(scores, start, gain=(base[name], tuned[name]))
                rows += _rows(unit, name, compared, size=swept.size(unit), n=len(scores))
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    frame["seed"] = frame["seed"].astype("Int64")
    return Effects(frame, swept.origin(asked, [one for one in prepared if _uneven(one)]))


@dataclass(frozen=True)
class _Sweep:
    """The base lens, the opened donors, and the sites at which they differ from base."""

    lens: Lens
    grid: Grid
    tuned: Checkpoint
    moved: Sites
    control: Checkpoint | None
    control_moved: Sites
    unlike: tuple[str, ...]

    def units(self) -> Iterator[Unit]:
        yield Unit("transplant", "all", self.moved, kind="reference")
        shared = None
        if self.control is not None:
            shared = pair(self.lens.checkpoint, self.control).comparable
            if self.control_moved:
                yield Unit("transplant", "all", self.control_moved, kind="control-tuning")
        yield from self.grid.units(self.moved, self.lens.checkpoint, control=shared)

    @property
    def whole(self) -> tuple[Intervention, ...]:
        """The tuned model: base with all that moved."""
        return (Transplant(self.moved, donor=self.tuned),)

    def interventions(self, unit: Unit) -> tuple[Intervention, ...]:
        """What turns base into the unit's model."""
        if unit.kind == "control-tuning" and self.control is not None:
            return (Transplant(unit.sites, donor=self.control),)
        if unit.action == "transplant":
            return (Transplant(unit.sites, donor=self.tuned),)
        if unit.action == "zero":
            return (*self.whole, Zero(unit.sites))
        kept = self.moved - unit.sites
        return (Transplant(kept, donor=self.tuned),) if kept else ()

    def scores(self, prepared: Sequence[Prepared], *interventions: Intervention) -> dict[str, Scores]:
        with self.lens.intervene(*interventions):
            return {one.task.name: to_scores(one.task, label_logps(self.lens, one)) for one in prepared}

    def size(self, unit: Unit) -> int:
        return sum(self.lens.checkpoint.storage[site].size for site in unit.sites)

    def origin(self, tasks: Sequence[Task], uneven: Sequence[Prepared]) -> dict[str, Any]:
        sources = {"base": (self.lens.source or self.lens.checkpoint).identity, "tuned": self.tuned.identity}
        if self.control is not None:
            sources["control"] = self.control.identity
        note = "The reference is base with all of tuned's comparable weights, not the tuned model itself: "
        return {
            "sources": sources,
            **provenance(),
            "seed": self.grid.seed,
            "n_random": self.grid.n_random,
            "device": str(self.lens.device),
            "dtype": self.lens.checkpoint.identity["dtype"],
            "tasks": {task.name: describe(task) for task in tasks},
            "findings": [*(note + words for words in self.unlike), *map(_uneven, uneven)],
        }


def _prepare(lens: Lens, grid: Grid) -> _Sweep:
    # Opened once: every unit would read the headers again.
    tuned = open_checkpoint(grid.donor)
    control = None if grid.control is None else open_checkpoint(grid.control)
    moved = _moved(lens, tuned)
    if not moved:
        raise NothingToCompare(f"{tuned.store.name} equals the base in every weight: nothing to transplant")
    beside = Sites(()) if control is None else _moved(lens, control)
    unlike = pair(lens.source or lens.checkpoint, tuned).unlike
    return _Sweep(lens, grid, tuned, moved, control, beside, unlike)


def _moved(lens: Lens, donor: Checkpoint) -> Sites:
    """Where a donor differs from base in the dtype of the live model."""
    live = lens.checkpoint
    return Sites(
        site
        for site in pair(live, donor).comparable
        if not same_bits(live.read(site).cpu(), donor.read(site).to(live.read(site).dtype).cpu())
    )


def _uneven(prepared: Prepared) -> str:
    """Say that the labels of a task differ in length, if they do: longer ones are less probable."""
    lengths = sorted({len(ids) for ids in prepared.labels})
    if len(lengths) < 2:
        return ""
    return (
        f"The labels of {prepared.task.name} have {lengths[0]} to {lengths[-1]} tokens, whose "
        "log-probabilities are summed, so longer labels are at a disadvantage."
    )


def _check_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    if not names:
        raise TaskError("a sweep needs a task to be judged by")
    for name in names:
        if names.count(name) > 1:
            fix = "load_task(…, name=…), or --task NAME:KIND=FILE"
            raise TaskError(f"two tasks are called {name!r}; give them names: {fix}")


def _rows(
    unit: Unit, task: str, compared: list[dict[str, Any]], *, size: int, n: int
) -> list[dict[str, Any]]:
    named = {"action": unit.action, "sites": unit.name, "parameters": size, "task": task}
    about = {"n": n, "seed": unit.seed, "kind": unit.kind, "null_of": unit.null_of}
    return [{**named, **row, **about} for row in compared]
