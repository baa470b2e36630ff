"""Drift: one row a site, a column a measure, and the ledger that accounts for every parameter."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from affectlens.drift.contrasting import contrast
from affectlens.errors import NoSuchSite, TableError, near
from affectlens.sites import Site
from affectlens.table import Table, site_of

KEYS = ("tower", "stack", "layer", "role", "expert", "param")


@dataclass(frozen=True, repr=False)
class Drift(Table):
    """How far each site moved from base to tuned; made by `affectlens.diff`.

    Columns: `parameter` (canonical name), `tower stack layer role expert param label` (the site),
    `size` (elements compared), `dtype`, `frobenius` ‖Δ‖, `base_norm` ‖W_base‖, `relative` =
    ‖Δ‖/‖W_base‖, `rms` = ‖Δ‖/√size, `mean_abs`, `max_abs`, `cosine` of W_base and W_tuned; `changed`,
    `sign_flips` and `nonfinite` count elements; `rounding`, the norm that rounding to tuned's dtype makes
    by itself (an error uniform within half a step): a Δ below it may be nothing else; `targeted` is false
    where the tuning could not reach. What factors or content hashes do not tell is null.

    With a control: `control_frobenius` and other norms of its change, `control_cosine` of Δ and Δ_control,
    `control_along`, the length of Δ along Δ_control, and `control_residual`, of what is left of Δ. With
    `spectra`: `spectral_norm stable_rank effective_rank singular_values residual` and the overlap of Δ's
    top directions with base's, `overlap_out overlap_in`, beside that of random ones. With `align`:
    `aligned_frobenius aligned_relative neurons_moved neurons_rescaled alignment`.
    """

    schema: ClassVar[str] = "affectlens.drift/1"
    rank: ClassVar[str] = "relative"
    shown: ClassVar[tuple[str, ...]] = ("parameter", "role", "layer", "relative", "rms", "frobenius")
    bars: ClassVar[tuple[str, ...]] = ("relative", "rms", "frobenius")

    @property
    def ledger(self) -> pd.DataFrame:
        """Every parameter of both sides, by state: `state sites base_parameters tuned_parameters note`."""
        columns = ["state", "sites", "base_parameters", "tuned_parameters", "note"]
        return pd.DataFrame(self.origin.get("ledger", []), columns=columns)

    @property
    def findings(self) -> tuple[str, ...]:
        """What must not be overlooked, such as a language model that did not move at all."""
        return tuple(self.origin.get("findings", ()))

    def by(self, *names: str) -> pd.DataFrame:
        """Aggregate by `"role" "layer" "tower"` or several of them, with sums of squares for the norms.

        A mean of ratios would let small tensors speak for large ones. Biases are counted with their
        role. Returns one row a group, largest `frobenius` first (layers in their order).
        """
        groups = [part.strip() for name in names for part in name.split(",")]
        for name in groups or [""]:
            if name not in KEYS:
                raise TableError(f"can't aggregate by {name!r}. By: {near(name, KEYS)}")
        grouped = self.frame.groupby(groups, dropna=False, sort=True)
        rows = pd.DataFrame(
            [dict(zip(groups, key, strict=True)) | _aggregate(group) for key, group in grouped]
        )
        if groups == ["layer"]:
            return rows
        return rows.sort_values("frobenius", kind="stable", ascending=False, ignore_index=True)

    def contrast(self, first: str, second: str) -> pd.DataFrame:
        """Compare two roles layer by layer under several norms, beside iid noise and the control.

        See `affectlens.drift.contrasting.contrast`. With one pair this is descriptive.
        """
        return contrast(self.frame, first=first, second=second)

    def neurons(self, site: Site | str) -> pd.DataFrame:
        """The drift of each neuron of a gate, up or down projection, after `detail="neurons"`.

        One row a neuron, a row of gate and up or a column of down: `neuron frobenius base_norm relative`.
        Raises `NoSuchSite` for a site without them.
        """
        return self._units(site, "neuron")

    def heads(self, site: Site | str) -> pd.DataFrame:
        """The drift of each head of q, k, v or o, after `detail="heads"`.

        One row a head: `head frobenius base_norm relative`. Heads of k and v are those that several query
        heads share. Raises `NoSuchSite` for a site without them.
        """
        return self._units(site, "head")

    def _units(self, site: Site | str, kind: str) -> pd.DataFrame:
        frame = self.frame
        if "unit" not in frame:
            raise NoSuchSite(f"this drift has no {kind}s: make it with diff(…, detail='{kind}s')")
        frame = frame[frame["unit"] == kind]
        keys = [repr(site_of(row)) for row in frame.to_dict("records")]
        names = frame["parameter"].tolist()
        asked = site if isinstance(site, str) else repr(site)
        at = [n for n, (key, name) in enumerate(zip(keys, names, strict=True)) if asked in (key, name)]
        if len(at) != 1:
            raise NoSuchSite(f"{len(at)} sites with {kind}s are called {asked}. Sites: {near(asked, keys)}")
        row = frame.iloc[at[0]]
        delta, base = np.asarray(row["unit_frobenius"], float), np.asarray(row["unit_base_norm"], float)
        ratio = np.divide(delta, base, out=np.full_like(delta, np.nan), where=base > 0)
        numbers = np.arange(len(delta))
        return pd.DataFrame({kind: numbers, "frobenius": delta, "base_norm": base, "relative": ratio})


def _aggregate(group: pd.DataFrame) -> dict[str, float | int]:
    size = int(group["size"].sum())
    frobenius = _root(group["frobenius"])
    known = group[group["base_norm"].notna()]
    base_norm = _root(known["base_norm"])
    row: dict[str, float | int] = {
        "sites": len(group),
        "size": size,
        "frobenius": frobenius,
        "base_norm": base_norm if len(known) else np.nan,
        "relative": _root(known["frobenius"]) / base_norm if base_norm else np.nan,
        "rms": frobenius / np.sqrt(size) if size else np.nan,
        "mean_abs": (group["mean_abs"] * group["size"]).sum(skipna=False) / size if size else np.nan,
        "max_abs": float(group["max_abs"].max(skipna=False)),
        **{name: _total(group[name]) for name in ("changed", "sign_flips", "nonfinite")},
    }
    if "rounding" in group:
        row["rounding"] = _root(group["rounding"])
    if len(known) < len(group):
        row["norms_known"] = len(known)  # the ratio runs over these sites alone
    if "control_frobenius" in group:
        # Only over the sites that the control has too, or the ratio would come out too small.
        known = group[group["control_frobenius"].notna()]
        control = _root(known["control_frobenius"]) if len(known) else np.nan
        norm, count = _root(known["base_norm"]), int(known["size"].sum())
        row["control_frobenius"] = control
        row["control_relative"] = control / norm if norm else np.nan
        row["control_rms"] = control / np.sqrt(count) if count else np.nan
        row |= _beside(known, control) if "control_along" in group else {}
    if "aligned_frobenius" in group:
        known = group[group["aligned_frobenius"].notna()]
        norm = _root(known["base_norm"])
        row["aligned_frobenius"] = _root(known["aligned_frobenius"]) if len(known) else np.nan
        row["aligned_relative"] = row["aligned_frobenius"] / norm if norm else np.nan
    return row


def _beside(known: pd.DataFrame, control: float) -> dict[str, float]:
    """The control's angle and share over a group, from the inner products of its sites."""
    inner = float((known["control_along"] * known["control_frobenius"]).sum())
    moved = _root(known["frobenius"])
    along = inner / control if control else 0.0
    return {
        "control_cosine": inner / (moved * control) if moved and control else np.nan,
        "control_along": along,
        "control_residual": float(np.sqrt(max(moved**2 - along**2, 0.0))),
    }


def _root(norms: pd.Series) -> float:
    return float(np.sqrt((norms.astype(float) ** 2).sum(skipna=False)))


def _total(counts: pd.Series) -> float | int:
    total = counts.astype(float).sum(skipna=False)
    return total if np.isnan(total) else int(counts.sum())
