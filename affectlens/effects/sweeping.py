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
from affectlens.errors import NothingToCompare
from affectlens.interventions import Transplant, Zero
from affectlens.lens import Intervention, Lens
from affectlens.sites import Sites
from affectlens.table import provenance
from affectlens.tasks import Scores, Task

_COLUMNS = (
    "action", "sites", "parameters", "task", "metric", "baseline", "value", "low", "high",
    "effect", "effect_low", "effect_high", "recovered", "n", "seed", "kind", "null_of",
)  # fmt: skip


def sweep(
    lens: Lens, grid: Grid, tasks: Sequence[Task], *, batch_size: int = 64, progress: bool = True
) -> Effects:
    """Apply every intervention of a grid to the base model in `lens` and judge it by every task.

    Draws of the null are judged by affective tasks only. Raises `NothingToCompare` when the donor
    equals base, `LensError` and `TaskError` as `evaluate` does.
    """
    swept = _Sweep(lens, grid, _moved(lens, open_checkpoint(grid.donor)))
    prepared = [prepare_task(lens, task, batch_size=batch_size) for task in tasks]
    units = list(swept.units())
    changed = Sites(site for unit in units for site in unit.sites)
    rows: list[dict[str, Any]] = []
    with lens.remember_senses(changed):
        base = [swept.scores(one) for one in prepared]
        tuned = [swept.scores(one, *swept.whole()) for one in prepared]
        for unit in tqdm(units, unit="intervention", disable=None if progress else True, leave=False):
            for one, before, after in zip(prepared, base, tuned, strict=True):
                if unit.kind == "random-control" and one.task.role != "affective":
                    continue
                scores = swept.scores(one, *swept.interventions(unit))
                start = before if unit.action == "transplant" else after
                rows += _rows(unit, one.task, swept.size(unit), compare(scores, start, gain=(before, after)))
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    frame["seed"] = frame["seed"].astype("Int64")
    return Effects(frame, swept.origin(tasks))


@dataclass(frozen=True)
class _Sweep:
    """The base lens, what is done to it, and the sites at which the donor differs."""

    lens: Lens
    grid: Grid
    moved: Sites

    def units(self) -> Iterator[Unit]:
        yield Unit("transplant", "all", self.moved, kind="reference")
        if self.grid.control is not None:
            control = _moved(self.lens, open_checkpoint(self.grid.control))
            yield Unit("transplant", "all", control, kind="control-tuning")
        yield from self.grid.units(self.moved, self.lens.checkpoint)

    def whole(self) -> tuple[Intervention, ...]:
        return (Transplant(self.moved, donor=self.grid.donor),)

    def interventions(self, unit: Unit) -> tuple[Intervention, ...]:
        """What turns base into the unit's model; the tuned model is base with all that moved."""
        if unit.kind == "control-tuning":
            assert self.grid.control is not None  # such units are listed only with a control
            return (Transplant(unit.sites, donor=self.grid.control),)
        if unit.action == "transplant":
            return (Transplant(unit.sites, donor=self.grid.donor),)
        if unit.action == "revert":
            return (Transplant(self.moved - unit.sites, donor=self.grid.donor),)
        return (*self.whole(), Zero(unit.sites))

    def scores(self, prepared: Prepared, *interventions: Intervention) -> Scores:
        with self.lens.intervene(*interventions):
            return to_scores(prepared.task, label_logps(self.lens, prepared))

    def size(self, unit: Unit) -> int:
        return sum(self.lens.checkpoint.storage[site].size for site in unit.sites)

    def origin(self, tasks: Sequence[Task]) -> dict[str, Any]:
        sources = {"base": self.lens.checkpoint.identity, "tuned": open_checkpoint(self.grid.donor).identity}
        if self.grid.control is not None:
            sources["control"] = open_checkpoint(self.grid.control).identity
        return {
            "sources": sources,
            **provenance(),
            "seed": self.grid.seed,
            "n_random": self.grid.n_random,
            "device": str(self.lens.device),
            "tasks": {task.name: describe(task) for task in tasks},
        }


def _moved(lens: Lens, donor: Checkpoint) -> Sites:
    live = lens.checkpoint
    sites = pair(live, donor).comparable
    moved = Sites(
        s for s in sites if not same_bits(live.read(s).cpu(), donor.read(s).to(live.read(s).dtype).cpu())
    )
    if not moved:
        raise NothingToCompare(
            f"{donor.store.name} equals the base in every weight: there is nothing to transplant"
        )
    return moved


def _rows(unit: Unit, task: Task, size: int, compared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    named = {"action": unit.action, "sites": unit.name, "parameters": size, "task": task.name}
    about = {"n": len(task), "seed": unit.seed, "kind": unit.kind, "null_of": unit.null_of}
    return [{**named, **row, **about} for row in compared]
