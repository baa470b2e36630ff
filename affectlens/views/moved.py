"""Moved: how far each role of the language tower moved, beside what noise and the control would say."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite
from affectlens.views.style import ROLES

CLOSE = 1e-6  # relative; roles of equal shape tie exactly under noise, up to rounding


@dataclass(frozen=True)
class Moved:
    """One row a role, in the usual order; `rows` is `Drift.by("role")` with two `noise_` columns."""

    rows: pd.DataFrame

    def column(self, name: str) -> dict[str, float]:
        """One column by role, or nothing where the table lacks it; `noise_` columns are expectations."""
        if name not in self.rows:
            return {}
        pairs = zip(self.rows["role"], self.rows[name], strict=True)
        return {str(role): float(value) for role, value in pairs if pd.notna(value)}

    def leaders(self, name: str) -> tuple[str, ...]:
        """The role with the largest value, or several that tie; none when all tie or nothing is known."""
        values = self.column(name)
        most = max(values.values(), default=0.0)
        tied = tuple(role for role, value in values.items() if value >= most * (1 - CLOSE))
        return () if not most or len(tied) == len(values) else tied

    @property
    def still(self) -> bool:
        """Whether nothing moved at all."""
        return not self.rows["frobenius"].sum()


def moved(drift: Drift) -> Moved:
    """Aggregate the language tower by role and add what noise of the pooled rms would give.

    Raises `NoSuchSite` when no site of the language tower has an attention or feed-forward role.
    """
    rows = language(drift).by("role")
    rows = rows.set_index("role").reindex([role for role in ROLES if role in set(rows["role"])]).reset_index()
    size = rows["size"].astype(float)
    pooled = float(np.sqrt((rows["frobenius"] ** 2).sum() / size.sum()))
    rows["noise_rms"] = pooled
    rows["noise_frobenius"] = pooled * np.sqrt(size)
    rows["noise_relative"] = pooled * np.sqrt(size) / rows["base_norm"].where(rows["base_norm"] > 0)
    return Moved(rows)


def language(drift: Drift, tower: str = "language") -> Drift:
    """Keep the attention and feed-forward sites of one tower that the tuning could reach."""
    kept = drift.where(tower=tower, role=ROLES)
    reached = _reached(kept.frame)
    if not any(reached):
        raise NoSuchSite(f"the tuning could reach no attention or feed-forward site of the {tower} tower")
    return Drift(kept.frame[reached].reset_index(drop=True), drift.origin)


def unreached(drift: Drift, tower: str = "language") -> tuple[str, ...]:
    """The roles none of whose sites the tuning could reach."""
    frame = drift.frame[drift.frame["tower"] == tower]
    there, reached = set(frame["role"]), set(frame["role"][_reached(frame)])
    return tuple(role for role in ROLES if role in there - reached)


def _reached(frame: pd.DataFrame) -> list[bool]:
    if "targeted" not in frame:
        return [True] * len(frame)
    return [bool(pd.isna(value) or value) for value in frame["targeted"]]
