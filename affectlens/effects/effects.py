"""Effects: the change that each intervention made to each task, with its interval and its null."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from affectlens.errors import TableError, near
from affectlens.printable import plain
from affectlens.stats.intervals import Interval
from affectlens.table import Table
from affectlens.table_frames import WholeFrame
from affectlens.table_schema import Columns, Shape
from affectlens.tasks import Scores
from affectlens.tasks.scores import TASK, find_metric


@dataclass(frozen=True, repr=False)
class Effects(Table):
    """A table with one row per intervention, task and metric; made by `affectlens.sweep`.

    - `kind`: `effect`, `random-control` (a draw of the layer-stratified null), `control-tuning` (the
      control's change at the same sites) or `reference` (the tuned model itself)
    - `sites`: the name of the group; `parameters`: its size
    - `baseline`: the value of the base model for `transplant`, of the tuned model for `revert` and `zero`
    - `value`, with the 95 % interval `low`..`high`
    - `effect` = value − baseline, paired by example, with the 95 % interval `effect_low`..`effect_high`
    - `recovered`: the share of the gain (tuned − base) that a transplant brings or a revert takes away; null
      where the interval of the gain includes zero or is wider than the gain

    The `transplant` of `all` is a whole model: the tuned one as `reference`, the control as `control-tuning`.

    >>> import pandas as pd
    >>> row = {"action": "transplant", "sites": "gate_proj", "task": "faces", "metric": "margin"}
    >>> effects = Effects(pd.DataFrame([{**row, "kind": "effect", "effect": 0.5, "effect_low": 0.2}]))
    >>> effects.where(sites="gate_proj").frame["effect"].item()
    0.5
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
    def summary(self) -> str:
        """One line: how many interventions were judged, and what the whole change does to each task."""
        if self.frame.empty:
            return super().summary
        metric = "margin" if (self.frame["metric"] == "margin").any() else str(self.frame["metric"].iloc[0])
        rows = self.frame[self.frame["metric"] == metric]
        whole = rows[rows["kind"] == "reference"]
        gains = [
            f"{plain(row['task'])} {row['effect']:+.2f} [{row['effect_low']:+.2f}, {row['effect_high']:+.2f}]"
            for row in whole.to_dict("records")
        ]
        count = len(rows[["action", "sites", "kind"]].drop_duplicates())
        gain = f"; all of tuned in base changes the {plain(metric)}: {', '.join(gains)}" if gains else ""
        return f"{self._named('Effects')}: {count} interventions on {rows['task'].nunique()} tasks{gain}"

    @property
    def failed(self) -> pd.DataFrame:
        """The interventions that failed and have no rows: `action sites kind tries why`."""
        columns = ["action", "sites", "kind", "tries", "why"]
        return WholeFrame(self.origin.get("failed", []), columns=columns)

    def ranks(self, metric: str = "margin") -> pd.DataFrame:
        """Rank each group's effect among the draws of its null: `action sites task draws at_least p`.

        `at_least` counts the draws whose effect is as strong or stronger in the expected direction: that of
        the tuning for a transplant, the opposite for a revert. `p` is null below 999 draws: 20 draws can't
        give a p below 1/21, whatever is true. Raises `TableError` for a metric that has no rows.
        """
        frame = self.frame[self.frame["metric"] == metric]
        if frame.empty:
            known = dict.fromkeys(self.frame["metric"])
            raise TableError(f"no row has metric={metric!r}. Metrics: {near(metric, known)}")
        draws = frame[frame["kind"] == "random-control"].groupby(["action", "task", "null_of"])["effect"]
        nulls = dict(iter(draws))
        signs = {task: _direction(frame, task) for task in frame["task"].unique()}
        rows = []
        for row in frame[frame["kind"] == "effect"].to_dict("records"):
            null = nulls.get((row["action"], row["task"], row["null_of"]))
            if null is None:
                continue
            sign = signs[row["task"]] * (-1.0 if row["action"] == "revert" else 1.0)
            strong = int((sign * null >= sign * row["effect"]).sum())
            # The effect itself counts as one of the draws, or p could be 0.
            p = (strong + 1) / (len(null) + 1) if len(null) >= 999 else None
            named = {name: row[name] for name in ("action", "sites", "task")}
            rows.append({**named, "draws": len(null), "at_least": strong, "p": p})
        columns = ["action", "sites", "task", "draws", "at_least", "p"]
        return pd.DataFrame(rows, columns=columns)


def _direction(frame: pd.DataFrame, task: str) -> float:
    """Return −1 where the whole change clearly lowered a task, else 1."""
    whole = frame[(frame["kind"] == "reference") & (frame["task"] == task)]
    return -1.0 if len(whole) and whole["effect_high"].iloc[0] < 0 else 1.0


def effect(after: Scores, before: Scores, *, metric: str) -> Interval:
    """Return the change of a metric with its 95 % interval, paired by example."""
    return find_metric(metric).change(after.values(metric), before.values(metric), clusters=after.clusters)


def compare(after: Scores, start: Scores, *, gain: tuple[Scores, Scores]) -> list[dict[str, Any]]:
    """Return one row per metric: value and effect with intervals, and the share of the gain.

    `gain` holds the scores of base and tuned. The share is what a transplant brings or a revert takes away;
    it is NaN where the interval of the gain includes zero or is wider than the gain.
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
