"""Reading: one outcome with the ranks of its null, and the questions that the sentences ask of both."""

import math
from dataclasses import dataclass

import pandas as pd

from affectlens.html import plain
from affectlens.views.outcome import Change, Outcome
from affectlens.views.wording import Said, allowed, barred, listed


@dataclass(frozen=True)
class Reading:
    """One outcome whose gain is read, and the null's ranks under its metric."""

    outcome: Outcome
    ranks: pd.DataFrame

    @property
    def task(self) -> str:
        """The task's name, fit to print."""
        return plain(self.outcome.task)

    def allows(self, words: str) -> Said:
        """Say of the task what may be concluded."""
        return allowed(f"{self.task}: {words}")

    def bars(self, words: str) -> Said:
        """Say of the task what may not be concluded."""
        return barred(f"{self.task}: {words}")

    @property
    def sign(self) -> float:
        """The direction from base to tuned: up unless tuning clearly lowered the score."""
        gain = self.outcome.gain
        return -1.0 if gain is not None and gain.clear and gain.effect < 0 else 1.0

    def parts(self, action: str) -> tuple[Change, ...]:
        """The changes of an action at the groups that stand for one role, or at all if none does."""
        changes = self.outcome.changes(action)
        return tuple(one for one in changes if one.role) or changes

    @property
    def kind(self) -> str:
        """What the parts are: roles, or groups of another kind."""
        return "role" if any(one.role for one in self.outcome.changes("transplant")) else "group"

    @property
    def gate(self) -> Change | None:
        """The transplant of the gate."""
        return next((one for one in self.parts("transplant") if one.role == "gate_proj"), None)

    def best(self, action: str) -> Change | None:
        """The part whose change goes furthest the way the action should."""
        way = -self.sign if action == "revert" else self.sign
        moved = [one for one in self.parts(action) if way * one.effect > 0]
        return max(moved, key=lambda one: way * one.effect, default=None)

    def level(self, best: Change) -> tuple[str, ...]:
        """The other parts that can't be told from the best one, since their intervals overlap."""
        others = [one for one in self.parts(best.action) if one.group != best.group]
        return tuple(one.name for one in others if not one.apart(best))

    def no_clearer(self, best: Change) -> str:
        """Name the parts that the best one does not clearly exceed, empty where there is none."""
        level = self.level(best)
        if len(level) > 2 and len(level) == len(self.parts(best.action)) - 1:
            return f"any other {self.kind}"
        return listed(level, "or") if level else ""

    def rank(self, change: Change) -> tuple[int, int, float] | None:
        """The draws of the change's null, how many are as strong or stronger, and p (NaN for few draws)."""
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
