"""The whole argument in one call: drift, sweep and report for one pair of checkpoints."""

from collections.abc import Mapping, Sequence
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
    """The result of a study: how far the weights moved, what changed in behaviour, and the report on both.

    >>> import affectlens as al
    >>> from tempfile import TemporaryDirectory
    >>> base, tuned, *_, tasks = al.load_demo()
    >>> few = dict(tasks=[tasks[0].head(8)], actions=("zero",), n_random=0)
    >>> with TemporaryDirectory() as folder:
    ...     found = study(base, tuned, **few, dtype="float32", progress=False)
    ...     sorted(file.name for file in found.save(folder).iterdir())
    ['drift.parquet', 'effects.parquet', 'report.html']
    """

    drift: Drift
    effects: Effects
    report: Report

    def save(self, out: str | Path) -> Path:
        """Write `drift.parquet`, `effects.parquet` and `report.html` into a folder, and return it."""
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
    by: str | Mapping[str, Sites] | None = None,
    actions: tuple[str, ...] = ("transplant", "revert", "zero"),
    n_random: int = 20,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    title: str = "",
    trust_remote_code: bool = False,
    executor: Any = None,
    progress: bool = True,
    batch_size: int = 64,
    prompt_of: str = "base",
    cue: str = "",
) -> Study:
    """Diff a pair, sweep the roles of its language model over tasks, and write a report.

    `control` is another tuning of the same base, on something other than affect. `by` groups the sites as in
    `Grid`; by default roles, attention, MLP and the rest. With `out`, the tables and the report are saved
    there, and meanwhile a journal, from which the same study resumes after a break. `executor`, `batch_size`
    and `prompt_of` are passed on to `sweep`, `device`, `dtype`, `cue` and `trust_remote_code` to `load`.

    Raises what `diff`, `load` and `sweep` raise, and `NothingToCompare` for two unrelated models.

    >>> import affectlens as al
    >>> base, tuned, *_, tasks = al.load_demo()
    >>> few = dict(tasks=[tasks[0].head(8)], actions=("zero",), n_random=0)
    >>> found = study(base, tuned, **few, dtype="float32", progress=False)
    >>> found.effects.where(sites="mlp", metric="margin").frame["action"].tolist()
    ['zero']
    """
    if out is not None:
        writable(Path(out) / "drift.parquet")  # raises now, not after hours of work
    before = open_checkpoint(base)
    after = open_checkpoint(tuned, base=before)
    other = None if control is None else open_checkpoint(control, base=before)
    drift = refuse_unrelated(diff(before, after, control=other, progress=progress))
    lens = load(before, dtype=dtype, device=device, cue=cue, trust_remote_code=trust_remote_code)
    draws = {"n_random": n_random, "seed": seed}
    groups = roles(before.sites) if by is None else by
    grid = Grid(before.sites, groups, actions, donor=after, control=other, **draws)
    journal = None if out is None else Path(out) / "sweep.journal"
    running = {"batch_size": batch_size, "executor": executor, "journal": journal, "progress": progress}
    effects = sweep(lens, grid, tasks, prompt_of=prompt_of, **running)
    found = Study(
        drift, effects, Report(drift, effects, title=title or f"{before.store.name} → {after.store.name}")
    )
    if out is not None:
        found.save(out)
    if journal is not None and not len(effects.failed):
        discard(journal)
    return found


def roles(sites: Sites) -> dict[str, Sites]:
    """Return the sites of each role in the language layers, of attention, of the MLP, and the rest."""
    layers = [s for s in sites if s.tower == "language" and s.layer is not None]
    named = {role: Sites(s for s in layers if s.role == role) for role in (*ATTENTION, *MLP)}
    blocks = {"attention": ATTENTION, "mlp": MLP}
    named |= {name: Sites(s for s in layers if s.role in group) for name, group in blocks.items()}
    named["rest"] = sites - named["attention"] - named["mlp"]
    return {name: group for name, group in named.items() if group}
