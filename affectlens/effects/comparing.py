"""Compare two sets of scores on the same examples: the effect, its interval, and its share of a gain."""

from typing import Any

import numpy as np

from affectlens.tasks import Scores
from affectlens.tasks.intervals import Interval, bootstrap, effective, tango


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
