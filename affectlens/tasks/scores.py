"""Scores: one row per example, so that every metric gets an interval and every comparison is paired.

A metric is a row of `METRICS`: a column and the function that fills it. Whatever evaluates, compares or shows
goes through that table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from affectlens.errors import TableError, near
from affectlens.stats.intervals import Interval, bootstrap, effective, tango, wilson
from affectlens.table import Table
from affectlens.table_schema import Columns, Shape

TASK: Shape = {  # what a result's origin says of a task
    "n": int | None,
    "clusters": int | None,
    "majority": int | float | None,
    "kind": str | None,
    "fit": bool | None,
}
Labels = Float[np.ndarray, "examples labels"]  # log-probabilities
Gold = Int[np.ndarray, " examples"]  # which of the labels is right
Values = Float[np.ndarray, " examples"]


def correct(logps: Labels, gold: Gold) -> Values:
    """Return 1 where the gold label alone is the most probable, 1/k where it is one of k that tie, else 0.

    Labels tie if their log-probabilities are equal to the last bit. Taking the first of them would make
    accuracy follow the order in which the labels are listed.

    >>> correct(np.log([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]), np.array([0, 0, 0])).tolist()
    [1.0, 0.5, 0.0]
    """
    best = logps == logps.max(1, keepdims=True)
    values: Values = best[np.arange(len(gold)), gold] / best.sum(1)
    return values


def margin(logps: Labels, gold: Gold) -> Values:
    """Return log p(gold) − log p(best other label): positive where the answer is right, 0 where both tie."""
    rows = np.arange(len(gold))
    others = logps.copy()
    others[rows, gold] = -np.inf
    values: Values = logps[rows, gold] - others.max(1)
    return values


@dataclass(frozen=True)
class Metric:
    """A metric: the mean of a per-example column of `Scores`, and how it is computed.

    `of` fills the column from the log-probabilities of all labels. Greedy answers have none: they fill
    `correct` alone. A `binary` column holds 0 and 1 and gets score intervals, any other the bootstrap over
    clusters, and so does a binary one that has ties in it.
    """

    column: str
    formula: str = ""  # shown beside the name where it says more
    of: Callable[[Labels, Gold], Values] | None = None
    binary: bool = False

    def interval(self, values: Values, clusters: Gold) -> Interval:
        """Return the mean with its 95 % interval: Wilson's for binary columns, at the effective size."""
        if not self.counts(values):
            return bootstrap(values, clusters)
        worth = effective(values, clusters)
        return wilson(float(values.mean()) * worth, worth)

    def change(self, after: Values, before: Values, *, clusters: Gold) -> Interval:
        """Return the mean change with its 95 % interval, paired by example: Tango's for binary columns."""
        change = after - before
        if not self.counts(after, before):
            return bootstrap(change, clusters)
        worth = effective(change, clusters)
        gained, lost = (float((sign * change > 0).mean()) * worth for sign in (1, -1))
        return tango(gained, lost, n=worth)

    def counts(self, *columns: Values) -> bool:
        """Return whether values are all 0 or 1, which score intervals count; ties lie between."""
        return self.binary and all(bool(np.isin(values, (0, 1)).all()) for values in columns)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("correct", of=correct, binary=True),
    "margin": Metric("margin", "log p(gold) − log p(best other)", margin),
}


@dataclass(frozen=True, repr=False)
class Scores(Table):
    """A table of what a model answered, one row per example; made by `affectlens.evaluate`.

    Columns: `id, cluster, label, prediction` (null: no answer; of labels that tie, the first), `correct` (0
    or 1; 1/k where gold is one of k labels that tie), and for constrained scoring `logp` of the
    gold label and `margin` = log p(gold) − log p(best other label).

    >>> rows = {"id": list("abcd"), "cluster": list("abcd"), "correct": [1, 1, 1, 0]}
    >>> print(Scores(pd.DataFrame(rows)).metric("accuracy"))
    0.750 [0.301, 0.954]
    """

    schema: ClassVar[str] = "affectlens.scores/1"
    rank: ClassVar[str] = "margin"
    shown: ClassVar[tuple[str, ...]] = ("id", "label", "prediction", "margin")
    columns: ClassVar[tuple[Columns, ...]] = (
        {"id": "text", "cluster": "text", "label": "text?", "prediction": "text?", "correct": "number"},
        {"logp": "number?"},
        # Each by itself: a table that was saved before a metric was added lacks its column.
        *({metric.column: "number?"} for metric in METRICS.values() if metric.column != "correct"),
    )
    about: ClassVar[Mapping[str, Shape]] = {"task": TASK}

    def metric(self, name: str = "accuracy") -> Interval:
        """Return the mean of a metric with its 95 % interval, which allows for clusters of examples."""
        return find_metric(name).interval(self.values(name), self.clusters)

    def values(self, name: str) -> Values:
        """Return the per-example values of a metric, or of any column. Raises `TableError`."""
        column = find_metric(name).column
        if column not in self.frame:
            raise TableError(f"these scores have no {name!r}. Metrics: {near(name, self.metrics)}")
        return self.frame[column].to_numpy(dtype=float)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics these scores have: greedy answers have no margin."""
        return tuple(name for name, one in METRICS.items() if one.column in self.frame)

    @property
    def clusters(self) -> Gold:
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


def find_metric(name: str) -> Metric:
    """Return the metric of a name; any other name is a column of numbers and its mean."""
    return METRICS.get(name, Metric(name))
