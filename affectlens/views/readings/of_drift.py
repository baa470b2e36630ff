"""Read a drift: how far each role of the language tower moved, beside iid noise and the control."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite
from affectlens.sites import ATTENTION, MLP

CLOSE = 1e-6  # relative tolerance of a tie: under noise, roles of equal shape differ by rounding alone
MUCH = 0.1  # share of ‖Δ‖² from which rounding is reported
ROLES = (*ATTENTION, *MLP)


@dataclass(frozen=True)
class Moved:
    """How far each role moved: `Drift.by("role")` and, as `noise_` columns, what iid noise would give."""

    rows: pd.DataFrame

    def column(self, name: str) -> dict[str, float]:
        """Return one column by role without nulls; empty if the table lacks the column."""
        if name not in self.rows:
            return {}
        pairs = zip(self.rows["role"], self.rows[name], strict=True)
        return {str(role): float(value) for role, value in pairs if pd.notna(value)}

    def leaders(self, name: str) -> tuple[str, ...]:
        """Return the role with the largest value, or several that tie; none if all tie or none is known."""
        values = self.column(name)
        most = max(values.values(), default=0.0)
        tied = tuple(role for role, value in values.items() if value >= most * (1 - CLOSE))
        return () if not most or len(tied) == len(values) else tied

    @property
    def still(self) -> bool:
        """Whether nothing moved, counting elements that are not finite as possibly moved."""
        return bool((self.rows["frobenius"] == 0).all() and not self.rows["nonfinite"].any())

    @property
    def realigned(self) -> bool:
        """Whether matching the neurons first changes a relative drift in its first four digits."""
        before, after = self.column("relative"), self.column("aligned_relative")
        return any(f"{before.get(role, 0.0):.4g}" != f"{value:.4g}" for role, value in after.items())

    @property
    def rounding(self) -> dict[str, float]:
        """The share of ‖Δ‖² by role that rounding to tuned's dtype explains, if it is at least `MUCH`."""
        moved = self.column("frobenius")
        shares = {r: (own / moved[r]) ** 2 for r, own in self.column("rounding").items() if moved.get(r)}
        return {role: min(1.0, share) for role, share in shares.items() if share >= MUCH}


def moved(drift: Drift) -> Moved:
    """Aggregate the language tower by role and add what iid noise of the pooled rms would give.

    Raises `NoSuchSite` if the tuning could reach no attention or feed-forward site of the language tower.
    """
    kept = language(drift)
    rows = totals(kept, ["role"])
    rows = rows.set_index("role").reindex([role for role in ROLES if role in set(rows["role"])]).reset_index()
    size = rows["size"].astype(float)
    # One rms for all roles: noise of each role's own rms would reproduce every bar exactly.
    pooled = _rms(kept.frame)
    rows["noise_rms"] = pooled
    rows["noise_frobenius"] = pooled * np.sqrt(size)
    # A ratio covers the sites whose base norm is known. Noise over all sites would look too large beside it.
    frame = kept.frame[kept.frame["base_norm"].notna()]
    known = frame.groupby("role")["size"].sum().reindex(rows["role"]).to_numpy(dtype=float)
    rows["noise_relative"] = _rms(frame) * np.sqrt(known) / rows["base_norm"].where(rows["base_norm"] > 0)
    return Moved(rows)


def totals(drift: Drift, by: Sequence[str]) -> pd.DataFrame:
    """Return `Drift.by`, with a relative drift of zero where nothing moved and the base norm is unknown."""
    rows = drift.by(*by)
    rows["relative"] = rows["relative"].mask((rows["frobenius"] == 0) & rows["base_norm"].isna(), 0.0)
    return rows


def language(drift: Drift, tower: str = "language") -> Drift:
    """Keep the attention and feed-forward sites of one tower that the tuning could reach.

    Raises `NoSuchSite` if none is left.
    """
    kept = drift.where(tower=tower, role=ROLES)
    there = reached(kept.frame)
    if not any(there):
        raise NoSuchSite(f"the tuning could reach no attention or feed-forward site of the {tower} tower")
    return Drift(kept.frame[there].reset_index(drop=True), drift.origin)


def unreached(drift: Drift, tower: str = "language") -> tuple[str, ...]:
    """Return the roles of a tower in which the tuning could reach no site."""
    frame = drift.frame[drift.frame["tower"] == tower]
    there, could = set(frame["role"]), set(frame["role"][reached(frame)])
    return tuple(role for role in ROLES if role in there - could)


def unscaled(drift: Drift) -> bool:
    """Return whether some Δ is known only up to a factor, because no file states LoRA's alpha."""
    frame = drift.frame
    # A cosine is null if Δ has no scale, but also if base or tuned is zero (relative = 1): leave those out.
    known = (frame["base_norm"] > 0) & (frame["frobenius"] > 0) & ((frame["relative"] - 1).abs() > CLOSE)
    return bool((known & frame["cosine"].isna()).any())


def reached(frame: pd.DataFrame) -> list[bool]:
    """Return for each row whether the tuning could reach its site."""
    if "targeted" not in frame:
        return [True] * len(frame)
    return [bool(pd.isna(value) or value) for value in frame["targeted"]]


def _rms(frame: pd.DataFrame) -> float:
    size = float(frame["size"].sum())
    return float(np.sqrt((frame["frobenius"] ** 2).sum() / size)) if size else np.nan
