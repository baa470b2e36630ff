"""The whole argument in one call: drift, sweep and report of one pair of checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Source, open_checkpoint
from affectlens.drift import Drift, diff
from affectlens.drift.diffing import refuse_unrelated
from affectlens.effects import Effects, Grid, sweep
from affectlens.effects.journal import discard
from affectlens.lens import load
from affectlens.sites import ATTENTION, MLP, Sites
from affectlens.table import writable
from affectlens.tasks import Task
from affectlens.views import Report


@dataclass(frozen=True)
class Study:
    """What a study found: how far (`drift`), what changed (`effects`), and both as a page (`report`)."""

    drift: Drift
    effects: Effects
    report: Report

    def save(self, out: str | Path) -> Path:
        """Write `drift.parquet`, `effects.parquet` and `report.html` into a folder."""
        folder = Path(out)
        self.drift.save(folder / "drift.parquet")
        self.effects.save(folder / "effects.parquet")
        self.report.save(folder / "report.html")
        return folder


def study(
    base: Source,
    tuned: Source,
    *,
    tasks: Sequence[Task],
    control: Source | None = None,
    out: str | Path | None = None,
    actions: tuple[str, ...] = ("transplant", "revert", "zero"),
    n_random: int = 20,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    title: str = "",
    trust_remote_code: bool = False,
    executor: Any = None,
    progress: bool = True,
) -> Study:
    """Diff a pair, sweep the roles of its language model over tasks, and write a report.

    `control` is a tuning of the same base on something else than affect. With `out`, tables and
    report are written there, and until then a journal: the same study, broken off, goes on from it.
    `executor` is what `sweep` takes, `trust_remote_code` what `load` does.

    Raises what `diff`, `load` and `sweep` raise, and `NothingToCompare` for models that are strangers to
    each other.
    """
    if out is not None:
        writable(Path(out) / "drift.parquet")  # before the work, not after it
    before = open_checkpoint(base)
    after = open_checkpoint(tuned, base=before)
    beside = None if control is None else open_checkpoint(control, base=before)
    drift = refuse_unrelated(diff(before, after, control=beside, progress=progress))
    lens = load(before, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    grid = Grid(
        before.sites,
        roles(before.sites),
        actions,
        donor=after,
        control=beside,
        n_random=n_random,
        seed=seed,
    )
    journal = None if out is None else Path(out) / "sweep.journal"
    effects = sweep(lens, grid, tasks, executor=executor, journal=journal, progress=progress)
    found = Study(
        drift, effects, Report(drift, effects, title=title or f"{before.store.name} → {after.store.name}")
    )
    if out is not None:
        found.save(out)
    if journal is not None and not len(effects.failed):
        discard(journal)
    return found


def roles(sites: Sites) -> dict[str, Sites]:
    """Group the sites of a model into the roles of its language layers, attention, MLP and the rest."""
    layers = [s for s in sites if s.tower == "language" and s.layer is not None]
    named = {role: Sites(s for s in layers if s.role == role) for role in (*ATTENTION, *MLP)}
    blocks = {"attention": ATTENTION, "mlp": MLP}
    named |= {name: Sites(s for s in layers if s.role in group) for name, group in blocks.items()}
    named["rest"] = sites - named["attention"] - named["mlp"]
    return {name: group for name, group in named.items() if group}
