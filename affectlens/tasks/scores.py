"""Scores: one row an example, so that every figure gets an interval and every comparison is paired."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from affectlens.errors import TableError, near
from affectlens.stats.intervals import Interval, bootstrap, effective, wilson
from affectlens.table import Table
from affectlens.table_schema import Columns, Shape

METRICS = {"accuracy": "correct", "margin": "margin"}  # metric → column; each metric is its mean
TASK: Shape = {  # what a result's origin says of a task
    "n": int | None,
    "clusters": int | None,
    "majority": int | float | None,
    "kind": str | None,
    "fit": bool | None,
}


@dataclass(frozen=True, repr=False)
class Scores(Table):
    """What a model answered; made by `affectlens.evaluate`.

    Columns: `id, cluster, label, prediction` (null: no answer), `correct` (0 or 1), and for
    constrained scoring `logp` of the gold label and `margin` = log p(gold) − log p(best other label).
    """

    schema: ClassVar[str] = "affectlens.scores/1"
    rank: ClassVar[str] = "margin"
    shown: ClassVar[tuple[str, ...]] = ("id", "label", "prediction", "margin")
    columns: ClassVar[tuple[Columns, ...]] = (
        {"id": "text", "cluster": "text", "label": "text?", "prediction": "text?", "correct": "number"},
        {"logp": "number?", "margin": "number?"},
    )
    about: ClassVar[Mapping[str, Shape]] = {"task": TASK}

    def metric(self, name: str = "accuracy") -> Interval:
        """The mean of a metric with its 95 % interval, which knows of the clusters that examples share."""
        values = self.values(name)
        if name == "accuracy":
            worth = effective(values, self.clusters)
            return wilson(float(values.mean()) * worth, worth)
        return bootstrap(values, self.clusters)

    def values(self, name: str) -> Float[np.ndarray, " examples"]:
        """The per-example values of a metric."""
        column = METRICS.get(name, name)
        if column not in self.frame:
            raise TableError(f"these scores have no {name!r}. Metrics: {near(name, self.metrics)}")
        return self.frame[column].to_numpy(dtype=float)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics these scores have: greedy answers have no margin."""
        return tuple(name for name, column in METRICS.items() if column in self.frame)

    @property
    def clusters(self) -> np.ndarray:
        """The cluster of each example, numbered."""
        return pd.factorize(self.frame["cluster"])[0]

    @property
    def summary(self) -> str:
        """One line: task, size and the metrics with their intervals."""
        task = self.origin.get("task", {})
        fit = " (trained on: fit, not skill)" if task.get("fit") else ""
        metrics = ", ".join(f"{name} {self.metric(name)}" for name in self.metrics)
        majority = f", majority {task['majority']:.2f}" if "majority" in task else ""
        return f"Scores: {task.get('name', 'task')}{fit}, n = {len(self)}, {metrics}{majority}"
