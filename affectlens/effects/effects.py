"""Effects: what each intervention did to each task, beside its nulls and within its interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from affectlens.errors import TableError
from affectlens.stats.intervals import Interval, bootstrap, effective, tango
from affectlens.table import Table
from affectlens.table_frames import WholeFrame
from affectlens.table_schema import Columns, Shape
from affectlens.tasks import Scores
from affectlens.tasks.scores import TASK


@dataclass(frozen=True, repr=False)
class Effects(Table):
    """One row per (intervention, task, metric); made by `affectlens.sweep`.

    `kind` is `effect`, `random-control` (a draw of the layer-stratified null), `control-tuning` (the
    control's change at the same sites) or `reference` (the tuned model itself). `sites` is the
    group's name and `parameters` its size. `value` lies within `low`..`high` (95 %); `effect` =
    value − baseline within `effect_low`..`effect_high`, paired by example. `baseline` is the base
    model's value for `transplant`, the tuned model's for `revert` and `zero`. `recovered` is the share
    of the gain (tuned − base) that a transplant brings or a revert takes away, null where the gain is
    not clear of zero or its interval wider than itself. The `transplant` of `all` is a whole model: the
    tuned one as `reference`, the control as `control-tuning`.
    """

    schema: ClassVar[str] = "affectlens.effects/1"
    rank: ClassVar[str] = "effect"
    shown: ClassVar[tuple[str, ...]] = (
        "action", "sites", "task", "metric", "kind",
        "baseline", "value", "effect", "effect_low", "effect_high",
    )  # fmt: skip
    columns: ClassVar[tuple[Columns, ...]] = (
        dict.fromkeys(("action", "sites", "task", "metric", "kind"), "text")
        | dict.fromkeys(("baseline", "value", "low", "high"), "number?")
        | dict.fromkeys(("effect", "effect_low", "effect_high", "recovered"), "number?")
        | {"null_of": "text?", "parameters": "count?", "n": "count"},
    )
    about: ClassVar[Mapping[str, Shape]] = {"tasks": {...: TASK}, "failed": [{}]}

    @property
    def failed(self) -> pd.DataFrame:
        """The interventions that are missing because they failed: `action sites kind tries why`."""
        columns = ["action", "sites", "kind", "tries", "why"]
        return WholeFrame(self.origin.get("failed", []), columns=columns)

    def ranks(self, metric: str = "margin") -> pd.DataFrame:
        """Rank each group's effect among the draws of its null: `action sites task draws at_least p`.

        `at_least` counts the draws whose effect is as strong or stronger in the direction in which the
        action should work: a transplant the way tuning went, a revert against it. `p` is null below
        999 draws: with 20, nothing smaller than 1/21 could come out, whatever is true.
        """
        frame = self.frame[self.frame["metric"] == metric]
        if frame.empty:
            raise TableError(f"no rows have metric={metric!r}")
        rows = []
        for _, row in frame[frame["kind"] == "effect"].iterrows():
            same = (frame["action"] == row["action"]) & (frame["task"] == row["task"])
            null = frame[same & (frame["kind"] == "random-control") & (frame["null_of"] == row["null_of"])]
            if null.empty:
                continue
            sign = _way(frame, str(row["task"])) * (-1.0 if row["action"] == "revert" else 1.0)
            strong = int((sign * null["effect"] >= sign * row["effect"]).sum())
            p = (strong + 1) / (len(null) + 1) if len(null) >= 999 else None
            named = {name: row[name] for name in ("action", "sites", "task")}
            rows.append({**named, "draws": len(null), "at_least": strong, "p": p})
        columns = ["action", "sites", "task", "draws", "at_least", "p"]
        return pd.DataFrame(rows, columns=columns)


def _way(frame: pd.DataFrame, task: str) -> float:
    """The direction in which tuning moved a task: down where the whole change clearly lowered it."""
    whole = frame[(frame["kind"] == "reference") & (frame["task"] == task)]
    return -1.0 if len(whole) and whole["effect_high"].iloc[0] < 0 else 1.0


def effect(after: Scores, before: Scores, *, metric: str) -> Interval:
    """The change of a metric with its 95 % interval, paired by example.

    Accuracy gets Tango's score interval, at the number of examples that clustered ones are worth;
    everything else the bootstrap over clusters.
    """
    change = after.values(metric) - before.values(metric)
    if metric != "accuracy":
        return bootstrap(change, after.clusters)
    worth = effective(change, after.clusters)
    gained, lost = (float((sign * change > 0).mean()) * worth for sign in (1, -1))
    return tango(gained, lost, n=worth)


def compare(after: Scores, start: Scores, *, gain: tuple[Scores, Scores]) -> list[dict[str, Any]]:
    """One row a metric: value and effect with intervals, and the share of the gain.

    `gain` holds the scores of base and tuned. The share counts what a transplant brings, or what a
    revert takes away, and is NaN where the gain is not clear of zero or known only vaguely: where its
    interval is wider than the gain.
    """
    rows = []
    for metric in after.metrics:
        value, change = after.metric(metric), effect(after, start, metric=metric)
        whole = effect(gain[1], gain[0], metric=metric)
        sign = 1.0 if start is gain[0] else -1.0
        rows.append(
            {
                "metric": metric,
                "baseline": float(start.values(metric).mean()),
                "value": value.value,
                "low": value.low,
                "high": value.high,
                "effect": change.value,
                "effect_low": change.low,
                "effect_high": change.high,
                "recovered": sign * change.value / whole.value if whole.divides else np.nan,
            }
        )
    return rows
