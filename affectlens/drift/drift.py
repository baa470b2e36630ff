"""Drift: one row a site, a column a measure, and the ledger that accounts for every parameter."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from affectlens.drift.contrasting import contrast
from affectlens.errors import TableError, near
from affectlens.table import Table

KEYS = ("tower", "stack", "layer", "role", "expert", "param")


@dataclass(frozen=True, repr=False)
class Drift(Table):
    """How far each site moved from base to tuned; made by `affectlens.diff`.

    Columns: `parameter` (canonical name), `tower stack layer role expert param label` (the site),
    `size` (elements), `dtype`, `frobenius` ‖Δ‖, `base_norm` ‖W_base‖, `relative` = ‖Δ‖/‖W_base‖,
    `rms` = ‖Δ‖/√size, `mean_abs`, `max_abs`, `cosine` of W_base and W_tuned; `changed`, `sign_flips`
    and `nonfinite` count elements; `targeted` is false where the tuning could not reach. With a
    control: `control_frobenius control_relative control_rms`, and `control_cosine` of Δ and Δ_control.
    """

    schema: ClassVar[str] = "affectlens.drift/1"
    rank: ClassVar[str] = "relative"
    shown: ClassVar[tuple[str, ...]] = ("parameter", "role", "layer", "relative", "rms", "frobenius")

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


def _aggregate(group: pd.DataFrame) -> dict[str, float | int]:
    size = int(group["size"].sum())
    frobenius = float(np.sqrt((group["frobenius"] ** 2).sum()))
    base_norm = float(np.sqrt((group["base_norm"] ** 2).sum()))
    row: dict[str, float | int] = {
        "sites": len(group),
        "size": size,
        "frobenius": frobenius,
        "base_norm": base_norm,
        "relative": frobenius / base_norm if base_norm else np.nan,
        "rms": frobenius / np.sqrt(size) if size else np.nan,
        "mean_abs": (group["mean_abs"] * group["size"]).sum() / size if size else np.nan,
        "max_abs": float(group["max_abs"].max()),
        **{name: int(group[name].sum()) for name in ("changed", "sign_flips", "nonfinite")},
    }
    if "control_frobenius" in group:
        # Only over the sites that the control has too, or the ratio would come out too small.
        known = group[group["control_frobenius"].notna()]
        control = float(np.sqrt((known["control_frobenius"] ** 2).sum())) if len(known) else np.nan
        norm, count = float(np.sqrt((known["base_norm"] ** 2).sum())), int(known["size"].sum())
        row["control_frobenius"] = control
        row["control_relative"] = control / norm if norm else np.nan
        row["control_rms"] = control / np.sqrt(count) if count else np.nan
    return row
