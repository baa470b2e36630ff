"""Moved: how far each role of the language tower moved, beside what noise and the control would say."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite
from affectlens.sites import ATTENTION, MLP

CLOSE = 1e-6  # relative; roles of equal shape tie exactly under noise, up to rounding
MUCH = 0.1  # the share of ‖Δ‖² from which on rounding is worth a word
ROLES = (*ATTENTION, *MLP)


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
        """Whether nothing moved at all, and nothing was left out that may have."""
        return bool((self.rows["frobenius"] == 0).all() and not self.rows["nonfinite"].any())

    @property
    def realigned(self) -> bool:
        """Whether matching neurons first makes a difference that shows in four digits."""
        before, after = self.column("relative"), self.column("aligned_relative")
        return any(f"{before.get(role, 0.0):.4g}" != f"{value:.4g}" for role, value in after.items())

    @property
    def rounding(self) -> dict[str, float]:
        """By role, the share of ‖Δ‖² that rounding to tuned's dtype makes by itself, where that is much."""
        moved = self.column("frobenius")
        shares = {r: (own / moved[r]) ** 2 for r, own in self.column("rounding").items() if moved.get(r)}
        return {role: min(1.0, share) for role, share in shares.items() if share >= MUCH}


def moved(drift: Drift) -> Moved:
    """Aggregate the language tower by role and add what noise of the pooled rms would give.

    Raises `NoSuchSite` when no site of the language tower has an attention or feed-forward role.
    """
    kept = language(drift)
    rows = totals(kept, ["role"])
    rows = rows.set_index("role").reindex([role for role in ROLES if role in set(rows["role"])]).reset_index()
    size = rows["size"].astype(float)
    pooled = _rms(kept.frame)
    rows["noise_rms"] = pooled
    rows["noise_frobenius"] = pooled * np.sqrt(size)
    # A ratio runs over the sites whose base norm is known, so its noise does too.
    frame = kept.frame[kept.frame["base_norm"].notna()]
    known = frame.groupby("role")["size"].sum().reindex(rows["role"]).to_numpy(dtype=float)
    rows["noise_relative"] = _rms(frame) * np.sqrt(known) / rows["base_norm"].where(rows["base_norm"] > 0)
    return Moved(rows)


def totals(drift: Drift, by: Sequence[str]) -> pd.DataFrame:
    """`Drift.by`, with a relative drift of zero where nothing moved and the base's norm is not known."""
    rows = drift.by(*by)
    rows["relative"] = rows["relative"].mask((rows["frobenius"] == 0) & rows["base_norm"].isna(), 0.0)
    return rows


def language(drift: Drift, tower: str = "language") -> Drift:
    """Keep the attention and feed-forward sites of one tower that the tuning could reach.

    Raises `NoSuchSite` where none is left.
    """
    kept = drift.where(tower=tower, role=ROLES)
    there = reached(kept.frame)
    if not any(there):
        raise NoSuchSite(f"the tuning could reach no attention or feed-forward site of the {tower} tower")
    return Drift(kept.frame[there].reset_index(drop=True), drift.origin)


def unreached(drift: Drift, tower: str = "language") -> tuple[str, ...]:
    """The roles none of whose sites the tuning could reach."""
    frame = drift.frame[drift.frame["tower"] == tower]
    there, could = set(frame["role"]), set(frame["role"][reached(frame)])
    return tuple(role for role in ROLES if role in there - could)


def contrasted(drift: Drift, *, first: str = "gate_proj", second: str = "up_proj") -> pd.DataFrame:
    """`Drift.contrast` over the layers in which the tuning could reach both roles.

    Raises `NoSuchSite` where there is none: a role that could not move is no rival.
    """
    return drift.contrast(first, second)


def unscaled(drift: Drift) -> bool:
    """Whether some Δ is known up to a factor alone, since no file says LoRA's alpha."""
    frame = drift.frame
    # Of two known matrices only one that is zero has no angle to the other.
    known = (frame["base_norm"] > 0) & (frame["frobenius"] > 0) & ((frame["relative"] - 1).abs() > CLOSE)
    return bool((known & frame["cosine"].isna()).any())


def reached(frame: pd.DataFrame) -> list[bool]:
    """For each row, whether the tuning could reach its site."""
    if "targeted" not in frame:
        return [True] * len(frame)
    return [bool(pd.isna(value) or value) for value in frame["targeted"]]


def _rms(frame: pd.DataFrame) -> float:
    size = float(frame["size"].sum())
    return float(np.sqrt((frame["frobenius"] ** 2).sum() / size)) if size else np.nan
