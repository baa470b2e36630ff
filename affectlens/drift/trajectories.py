"""Follow one tuning from checkpoint to checkpoint: over its epochs, or from base over SFT to RL.

    start ── diff ──▶ step i: how far from the start, and how far along the whole way ──▶ Trajectory
    step i − 1 ── diff ──▶ step i: how far in this step

The steps of one tuning are not independent runs: `affectlens.agreement` needs separate tunings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.drift.diffing import diff
from affectlens.drift.diffing import findings as found
from affectlens.drift.drift import Drift
from affectlens.drift.groups import KEYS, Groups, norms, over, parsed
from affectlens.errors import TableError
from affectlens.printable import plain
from affectlens.table import Table, provenance
from affectlens.table_frames import WholeFrame

_SITE = ["parameter", "tower", "stack", "layer", "role", "expert", "param", "label"]
_STEP = {name: f"step_{name}" for name in ("frobenius", "base_norm", "relative")}


@dataclass(frozen=True, repr=False)
class Trajectory(Table):
    """How far each site moved, step by step; made by `affectlens.trajectory`.

    One row per step (1, 2, …) and site. Columns: `step`, `name` (of the checkpoint), the site's
    (`parameter tower stack layer role expert param label size targeted`); from the start to this step
    `frobenius` ‖Δ_i‖, `base_norm` ‖W_0‖, `relative`, `rms`, `cosine` of W_0 and W_i; from the step
    before `step_frobenius`, `step_base_norm` ‖W_{i−1}‖, `step_relative`; of the whole way
    `final_frobenius` ‖Δ_last‖, and `along`, the cosine of Δ_i and Δ_last (null where either is zero).

    >>> import affectlens as al
    >>> base, tuned, control, _ = al.load_demo()
    >>> steps = al.trajectory([base, control, tuned], progress=False)
    >>> steps.by("step")[["step", "name", "sites", "relative", "along"]].round(2)
       step     name  sites  relative  along
    0     1  control    113      0.21   0.04
    1     2    tuned    113      0.22   1.00
    """

    schema: ClassVar[str] = "affectlens.trajectory/1"
    rank: ClassVar[str] = "relative"
    shown: ClassVar[tuple[str, ...]] = (
        "step", "name", "parameter", "role", "layer", "relative", "step_relative", "along", "targeted",
    )  # fmt: skip
    flags: ClassVar[tuple[str, ...]] = ("targeted",)
    ranked: ClassVar[bool] = True

    @property
    def ledger(self) -> pd.DataFrame:
        """Every parameter of the start and of each step, by state: `Drift.ledger` with a column `step`."""
        columns = ["step", "state", "sites", "base_parameters", "tuned_parameters", "note"]
        return WholeFrame(self.origin.get("ledger", []), columns=columns)

    @property
    def findings(self) -> tuple[str, ...]:
        """Sentences a reader must not overlook, each with its step."""
        return tuple(self.origin.get("findings", ()))

    def by(self, *names: str) -> pd.DataFrame:
        """Aggregate each step by `"role" "layer" "tower"` or several, with sums of squares for the norms.

        Steps are never added up, so `by("role")` and `by("step,role")` are the same; `by("step")` gives
        one row for each whole step. `along` is the cosine of a group's change with its final change.
        Returns one row per step and group, in order.
        """
        known = ("step", *KEYS)
        return _aggregate(self.frame, ["step", "name", *(n for n in parsed(names, known) if n != "step")])


def trajectory(
    checkpoints: Sequence[Source],
    *,
    preset: str | None = None,
    alpha: float | None = None,
    progress: bool = True,
) -> Trajectory:
    """Measure how far every site moved from the first checkpoint to each later one, and step by step.

    `checkpoints` are in order, the start first; each is anything that `diff` takes. Each later one is
    compared with the start, together with the last one, and with the one before. `preset` and `alpha`
    are as in `diff`. Raises `TableError` for fewer than two checkpoints, and the errors of `diff`.

    >>> import affectlens as al
    >>> base, tuned, control, _ = al.load_demo()
    >>> steps = al.trajectory([base, control, tuned], progress=False)
    >>> gate = steps.where(role="gate_proj", layer=0).frame
    >>> gate[["step", "relative", "step_relative"]].round(2).values.tolist()
    [[1.0, 0.67, 0.67], [2.0, 0.69, 0.81]]
    """
    if len(checkpoints) < 2:
        raise TableError(
            f"a trajectory needs a start and at least one step, got {len(checkpoints)} checkpoints"
        )
    start = open_checkpoint(checkpoints[0], preset=preset, alpha=alpha)
    later = (open_checkpoint(one, base=start, preset=preset, alpha=alpha) for one in checkpoints[1:])
    opened = [start, *later]
    frames: list[pd.DataFrame] = []
    findings: list[str] = []
    ledger: list[dict[str, Any]] = []
    for step in range(1, len(opened)):
        whole, part = _step(opened, step, progress)
        frames.append(_rows(whole, part, step))
        findings += _told(whole, part, step)
        ledger += [{"step": step, **row} for row in whole.origin["ledger"]]
    frame = _with_last(pd.concat(frames, ignore_index=True))
    sources = {"start": start.identity}
    sources |= {f"step {step}": opened[step].identity for step in range(1, len(opened))}
    origin = {"sources": sources, **provenance(), "ledger": ledger, "findings": findings}
    return Trajectory(frame, origin)


def _step(opened: Sequence[Checkpoint], step: int, progress: bool) -> tuple[Drift, Drift]:
    """Measure the drift from the start, with the last step as control, and that from the step before."""
    last = None if step == len(opened) - 1 else opened[-1]
    whole = diff(opened[0], opened[step], control=last, progress=progress)
    return whole, whole if step == 1 else diff(opened[step - 1], opened[step], progress=progress)


def _rows(whole: Drift, part: Drift, step: int) -> pd.DataFrame:
    named = [*_SITE, "size", "targeted", "frobenius", "base_norm", "relative", "rms", "cosine"]
    beside = {"control_frobenius": "final_frobenius", "control_cosine": "along"}
    rows = whole.frame.reindex(columns=[*named, *beside]).rename(columns=beside)
    steps = part.frame[[*_SITE, *_STEP]].rename(columns=_STEP)
    rows = rows.merge(steps, on=_SITE, how="left", validate="one_to_one")
    rows.insert(0, "step", step)
    rows.insert(1, "name", whole.origin["sources"]["tuned"]["name"])
    order = [name for name in rows if name not in beside.values()]
    return rows[[*order, *beside.values()]].astype(dict.fromkeys(beside.values(), float))


def _with_last(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill in the last step, which had no control: its change is the final one."""
    last, moved = frame["step"] == frame["step"].max(), frame["frobenius"] > 0
    final = frame["final_frobenius"].where(~last, frame["frobenius"])
    along = frame["along"].where(~last, moved.astype(float).where(moved)).clip(-1.0, 1.0)
    return frame.assign(final_frobenius=final, along=along)


def _told(whole: Drift, part: Drift, step: int) -> Iterator[str]:
    name = f"Step {step} ({plain(whole.origin['sources']['tuned']['name'])})"
    # The last checkpoint was passed as a control: findings on it as a control would mislead.
    beside = [column for column in whole.frame if str(column).startswith("control_")]
    alone = set(found(whole.frame.drop(columns=beside), ()))
    strange = {finding for finding in found(whole.frame, ()) if finding not in alone}
    own = [f for f in whole.findings if f not in strange and not f.startswith("control: ")]
    yield from (f"{name}: {finding}" for finding in own)
    if part is not whole:
        yield from (f"{name}, from the step before: {f}" for f in part.findings if f not in own)


def _aggregate(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    groups = Groups.of(frame, names)
    known = frame["step_frobenius"].notna() & frame["step_base_norm"].notna()
    there = groups.count(known) > 0
    step = np.where(there, groups.root(frame["step_frobenius"], over=known), np.nan)
    before = np.where(there, groups.root(frame["step_base_norm"], over=known), np.nan)
    # Only over the sites that the last checkpoint has too, or the angle would be too wide.
    both = frame["final_frobenius"].notna()
    final = groups.root(frame["final_frobenius"], over=both)
    inner = frame["along"].fillna(0.0) * frame["frobenius"] * frame["final_frobenius"]
    product = groups.root(frame["frobenius"], over=both) * final
    return norms(frame, groups).assign(
        step_frobenius=step,
        step_base_norm=before,
        step_relative=over(step, before),
        final_frobenius=np.where(groups.count(both) > 0, final, np.nan),
        along=np.clip(over(groups.sum(inner, over=both), product), -1.0, 1.0),
    )
