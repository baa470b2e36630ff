"""Read effects: the gain of each task under a metric, the effect of each group of sites, and their nulls."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from affectlens.effects.effects import Effects
from affectlens.errors import TableError, near
from affectlens.printable import plain
from affectlens.stats.intervals import Interval
from affectlens.views.readings.numbers import listed, signed
from affectlens.views.readings.of_drift import ROLES

WHOLE = "all"  # how a sweep names the group of everything that moved


@dataclass(frozen=True)
class EffectRow:
    """One row of effects: what an action at a group of sites did to the score, with its 95 % interval."""

    action: str
    group: str
    baseline: float
    effect: float
    low: float
    high: float
    recovered: float
    size: float
    null_of: str

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero; false without an interval."""
        return self._span.clear_of_zero

    @property
    def divides(self) -> bool:
        """Whether shares of the effect make sense: its interval is clear of zero and no wider than itself."""
        return self._span.divides

    def apart(self, other: "EffectRow") -> bool:
        """Return whether two intervals do not overlap; false without intervals."""
        return self.low > other.high or other.low > self.high

    @property
    def measured(self) -> str:
        """The effect and its interval as text."""
        return f"{signed(self.effect)} [{self.interval or 'no interval'}]"

    @property
    def interval(self) -> str:
        """The interval as text, empty if there is none."""
        if math.isnan(self.low) or math.isnan(self.high):
            return ""
        return f"{self.low:+.3g} to {self.high:+.3g}".replace("-", "\N{MINUS SIGN}")

    @property
    def role(self) -> str | None:
        """The role, if the group is a whole role of the language tower."""
        name = self.group.removeprefix("language.")
        return name if name in ROLES else None

    @property
    def hue(self) -> str | None:
        """The role that colours the group, such as gate_proj for `12.gate_proj`; language tower only."""
        leaf = self.group.rpartition(".")[2]
        return leaf if leaf in ROLES and not self.group.startswith(("vision", "audio", "projector")) else None

    @property
    def name(self) -> str:
        """The role if the group is one, else the group's name, fit to print."""
        return self.role or plain(self.group)

    @property
    def _span(self) -> Interval:
        return Interval(self.effect, self.low, self.high)


@dataclass(frozen=True)
class Outcome:
    """The rows of one task under one metric, and what figures and sentences ask of them."""

    task: str
    metric: str
    rows: pd.DataFrame
    about: dict[str, Any]

    @property
    def gain(self) -> EffectRow | None:
        """The effect of the whole tuning (tuned minus base), if the tuned model was scored."""
        return next((_change(row) for row in self._of("reference")), None)

    @property
    def control(self) -> EffectRow | None:
        """The effect of the whole control tuning (control minus base), if the control was scored."""
        return next((_change(row) for row in self._of("control-tuning") if row["sites"] == WHOLE), None)

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions in the table, transplant and revert first."""
        return tuple(_ordered((row["action"] for row in self._of("effect")), ("transplant", "revert")))

    @property
    def fitted(self) -> bool:
        """Whether the tuning was trained on these examples, so that a score says nothing about new ones."""
        return bool(self.about.get("fit"))

    @property
    def headline(self) -> bool:
        """Whether the task is affective, neither a control nor a neutral task."""
        return str(self.about.get("kind") or "affective") == "affective"

    @property
    def leading(self) -> bool:
        """Whether sentences divide the gain among roles: the task is affective and its examples are new."""
        return self.headline and not self.fitted

    def changes(self, action: str, kind: str = "effect") -> tuple[EffectRow, ...]:
        """Return the effects of one action, one a group, roles first and in their usual order."""
        found = [_change(row) for row in self._of(kind) if row["action"] == action]
        order = [change.role or "" for change in found]
        keys = [ROLES.index(role) if role else len(ROLES) for role in order]
        return tuple(change for _, change in sorted(zip(keys, found, strict=True), key=lambda pair: pair[0]))

    def change(self, action: str, group: str, *, kind: str = "effect") -> EffectRow | None:
        """Return the effect of one action at one group, or None if it was not tried."""
        return next((one for one in self.changes(action, kind) if one.group == group), None)

    def of_role(self, action: str, role: str) -> EffectRow | None:
        """Return the effect of one action at the group that is one role, or None if it was not tried."""
        return next((one for one in self.changes(action) if one.role == role), None)

    def null(self, change: EffectRow) -> tuple[float, ...]:
        """Return the effects of the null draws that belong to a change, empty if none were drawn."""
        if not change.null_of:
            return ()
        rows = [row for row in self._of("random-control") if row["action"] == change.action]
        return tuple(float(row["effect"]) for row in rows if _text(row.get("null_of")) == change.null_of)

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self._records if row["kind"] == kind]

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        records = self.rows.to_dict("records")
        return [{str(name): cell for name, cell in row.items()} for row in records]


@dataclass(frozen=True)
class Reading:
    """An outcome with the ranks of its null, and which of its groups lead."""

    outcome: Outcome
    ranks: pd.DataFrame

    @property
    def task(self) -> str:
        """The task's name, fit to print."""
        return plain(self.outcome.task)

    @property
    def sign(self) -> float:
        """The direction from base to tuned: 1 unless tuning clearly lowered the score."""
        # An unclear gain gives no direction; up is the one that a tuning aims at.
        gain = self.outcome.gain
        return -1.0 if gain is not None and gain.clear and gain.effect < 0 else 1.0

    def parts(self, action: str) -> tuple[EffectRow, ...]:
        """Return the effects of an action at groups that are one role, or at all groups if none is."""
        # Blocks such as attention contain roles. Ranking both together would let a block beat its own parts.
        changes = self.outcome.changes(action)
        return tuple(one for one in changes if one.role) or changes

    @property
    def kind(self) -> str:
        """What to call the parts: role, or group."""
        return "role" if any(one.role for one in self.outcome.changes("transplant")) else "group"

    @property
    def gate(self) -> EffectRow | None:
        """The effect of transplanting the gate, if it was tried."""
        return next((one for one in self.parts("transplant") if one.role == "gate_proj"), None)

    def best(self, action: str) -> EffectRow | None:
        """Return the part with the largest effect in the action's direction, or None if none has that sign.

        A transplant is expected to move base towards tuned, a revert tuned towards base.
        """
        way = -self.sign if action == "revert" else self.sign
        moved = [one for one in self.parts(action) if way * one.effect > 0]
        return max(moved, key=lambda one: way * one.effect, default=None)

    def level(self, best: EffectRow) -> tuple[str, ...]:
        """Return the names of the other parts whose intervals overlap that of the best one."""
        others = [one for one in self.parts(best.action) if one.group != best.group]
        return tuple(one.name for one in others if not one.apart(best))

    def no_clearer(self, best: EffectRow) -> str:
        """Name the parts that the best one does not clearly exceed; empty if it exceeds all."""
        level = self.level(best)
        # Naming all the others one by one would make a long sentence that says less.
        if len(level) > 2 and len(level) == len(self.parts(best.action)) - 1:
            return f"any other {self.kind}"
        return listed(level, "or") if level else ""

    def rank(self, change: EffectRow) -> tuple[int, int, float] | None:
        """Return the number of null draws, how many are as strong or stronger, and p (NaN for few)."""
        if self.ranks.empty:
            return None
        same = (self.ranks["action"] == change.action) & (self.ranks["task"] == self.outcome.task)
        rows = self.ranks[same & (self.ranks["sites"] == change.group)]
        if rows.empty:
            return None
        p = rows["p"].iloc[0]
        return (
            int(rows["draws"].iloc[0]),
            int(rows["at_least"].iloc[0]),
            float(p) if pd.notna(p) else math.nan,
        )


def outcomes(effects: Effects, metric: str | None = None) -> tuple[Outcome, ...]:
    """Return every task under one metric (default: all metrics), affective tasks before the others.

    Raises `TableError` for a metric that the table lacks.
    """
    frame = effects.frame
    if metric is not None and metric not in set(frame["metric"]):
        raise TableError(f"no rows have metric={metric!r}. Metrics: {near(metric, metrics(effects))}")
    about = effects.origin.get("tasks", {})
    found = []
    for name in [metric] if metric is not None else metrics(effects):
        rows = frame[frame["metric"] == name]
        for task in dict.fromkeys(rows["task"]):
            known = about.get(task, {})
            found.append(Outcome(str(task), str(name), rows[rows["task"] == task], dict(known)))
    return tuple(sorted(found, key=lambda one: (not one.headline, one.fitted)))


def metrics(effects: Effects) -> tuple[str, ...]:
    """Return the metrics of a table, the margin first; raise `TableError` if it has no rows."""
    if effects.frame.empty:
        raise TableError("this Effects table has no rows: nothing to show or conclude")
    # The margin changes before a label flips, so it shows small effects that accuracy misses.
    return tuple(_ordered((str(name) for name in effects.frame["metric"]), ("margin",)))


def _ordered(names: Iterable[str], first: tuple[str, ...]) -> list[str]:
    there = list(dict.fromkeys(names))
    return [name for name in first if name in there] + [name for name in there if name not in first]


def _change(row: dict[str, Any]) -> EffectRow:
    return EffectRow(
        action=str(row["action"]),
        group=str(row["sites"]),
        baseline=_float(row.get("baseline")),
        effect=_float(row.get("effect")),
        low=_float(row.get("effect_low")),
        high=_float(row.get("effect_high")),
        recovered=_float(row.get("recovered")),
        size=_float(row.get("parameters")) or math.nan,  # shares of zero parameters are undefined
        null_of=_text(row.get("null_of")),
    )


def _float(cell: Any) -> float:
    return math.nan if cell is None or pd.isna(cell) else float(cell)


def _text(cell: Any) -> str:
    return "" if cell is None or pd.isna(cell) else str(cell)
