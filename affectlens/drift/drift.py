"""`Drift`: one row a site, one column a measure, and the ledger that accounts for every parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from affectlens.drift.groups import (
    KEYS,
    UNITS,
    Groups,
    aggregate,
    contrast,
    norms,
    over,
    parsed,
    unfolded,
    with_units,
)
from affectlens.errors import NoSuchSite, near
from affectlens.printable import plain
from affectlens.sites import Site
from affectlens.table import Table, site_of
from affectlens.table_frames import WholeFrame
from affectlens.table_schema import Columns, Shape


@dataclass(frozen=True, repr=False)
class Drift(Table):
    """How far each site moved from base to tuned; made by `affectlens.diff`.

    Columns: `parameter` (canonical name), `tower stack layer role expert param label` (the site),
    `size` (elements compared), `dtype`, `frobenius` ‖Δ‖, `base_norm` ‖W_base‖, `tuned_norm`, `relative` =
    ‖Δ‖/‖W_base‖, `rms` = ‖Δ‖/√size, `mean_abs`, `max_abs`, `cosine` of W_base and W_tuned; `changed`,
    `sign_flips` and `nonfinite` count elements; `rounding` is the norm of the error of saving the changed
    elements in tuned's dtype (uniform within half a step); `targeted` is false for sites that the tuning
    could not reach. Measures that don't follow from factors or content hashes are null.

    Blocks of 2,048 values are summed in float32, so norms have a relative error, and `cosine` an absolute
    one, of up to about 1e-6 (measured: 4e-7 in tensors of one block, 2e-8 from a million values on). For a
    small change 1 − `cosine` keeps its digits: it follows from ‖Δ‖² and ⟨W_base,Δ⟩, not from two products.

    With a control: `control_frobenius` and other norms of its change, `control_cosine` of Δ and Δ_control,
    `control_along`, the length of Δ along Δ_control, and `control_residual`, the norm of the rest of Δ.
    With `spectra`: `spectral_norm stable_rank effective_rank singular_values residual` and the overlap of
    Δ's top directions with base's, `overlap_out overlap_in`, and that of random ones. With `align`:
    `aligned_frobenius aligned_relative neurons_moved neurons_rescaled alignment`.

    >>> import affectlens as al
    >>> base, tuned, *_ = al.load_demo()
    >>> drift = al.diff(base, tuned, progress=False)
    >>> drift.tally
    'ledger: 28 paired, 85 identical'
    >>> gates = drift.where(role="gate_proj")
    >>> gates.sites, gates.frame["relative"].round(2).tolist()
    (Sites(4: language gate_proj, layers 0-3), [0.69, 0.59, 0.54, 0.47])
    """

    schema: ClassVar[str] = "affectlens.drift/1"
    rank: ClassVar[str] = "relative"
    shown: ClassVar[tuple[str, ...]] = (
        "parameter",
        "role",
        "layer",
        "relative",
        "rms",
        "frobenius",
        "targeted",
    )
    flags: ClassVar[tuple[str, ...]] = ("targeted",)
    ranked: ClassVar[bool] = True
    bars: ClassVar[tuple[str, ...]] = ("relative", "rms", "frobenius")
    columns: ClassVar[tuple[Columns, ...]] = (
        dict.fromkeys(("parameter", "tower", "role", "param"), "text")
        | dict.fromkeys(("stack", "label", "dtype"), "text?")
        | dict.fromkeys(("size", "nonfinite"), "count")
        | dict.fromkeys(("layer", "expert", "changed", "sign_flips"), "count?")
        | dict.fromkeys(("frobenius", "base_norm", "relative", "rms"), "number?")
        | dict.fromkeys(("mean_abs", "max_abs", "cosine"), "number?")
        | {"targeted": "boolean?"},
        {"tuned_norm": "number?"},
        {"rounding": "number?"},
        dict.fromkeys((f"control_{name}" for name in ("frobenius", "relative", "rms", "cosine")), "number?"),
        {"control_mean_abs": "number?", "control_max_abs": "number?"},
        {"control_along": "number?", "control_residual": "number?"},
        {"aligned_frobenius": "number?", "aligned_relative": "number?"},
        {"unit": "text?"},
        {"unit_frobenius": "array?", "unit_base_norm": "array?"},
    )
    about: ClassVar[Mapping[str, Shape]] = {
        "ledger": [
            {"state": str, "note": str | None}
            | dict.fromkeys(("sites", "base_parameters", "tuned_parameters"), int | None)
        ]
    }

    @property
    def ledger(self) -> pd.DataFrame:
        """Every parameter of both sides, by state: `state sites base_parameters tuned_parameters note`."""
        columns = ["state", "sites", "base_parameters", "tuned_parameters", "note"]
        return WholeFrame(self.origin.get("ledger", []), columns=columns)

    @property
    def findings(self) -> tuple[str, ...]:
        """Sentences a reader must not overlook, such as that the language model did not move at all."""
        return tuple(self.origin.get("findings", ()))

    @property
    def summary(self) -> str:
        """One line: how many sites moved, how far in all, and which roles furthest for their size."""
        moved = int((self.frame["frobenius"] > 0).sum())
        head = f"{self._named('Drift')}: {moved:,} of {len(self):,} sites moved"
        if not moved:
            return head
        language = self.frame[self.frame["tower"] == "language"]
        roles = aggregate(language, ["role"]).dropna(subset=["relative"]).nlargest(3, "relative")
        most = ", ".join(
            f"{plain(role)} {value:.3g}" for role, value in zip(roles["role"], roles["relative"], strict=True)
        )
        return head + (f"; ‖Δ‖/‖W_base‖ of the language model is largest in {most}" if most else "")

    @property
    def tally(self) -> str:
        """The ledger in one line: the number of sites in each state."""
        states = self.ledger.groupby("state", sort=False)["sites"].sum()
        return "ledger: " + ", ".join(f"{n:,} {state}" for state, n in states.items()) if len(states) else ""

    def by(self, *names: str) -> pd.DataFrame:
        """Aggregate by `"site" "role" "layer" "tower" "head" "neuron"` or several, with sums of squares.

        A mean of ratios would weigh small tensors like large ones. Biases count with their role.
        `targeted` is the number of a group's `sites` that the tuning could reach: 0 where nothing could
        move. `"head"` and `"neuron"` need `detail=`; each sums over all sites that have one of that number,
        so use `"layer,role,head"` for single heads: head 3 of v_proj is shared by several of q_proj.
        Returns one row a group, largest `frobenius` first (layers in their order). Raises `TableError` for
        another name, and where there are no such units.
        """
        groups = parsed(names, (*KEYS, *UNITS))
        units = [name for name in groups if name in UNITS]
        if units:
            frame = unfolded(self.frame, units[0])
            rows = norms(frame, Groups.of(frame, groups))
        else:
            rows = aggregate(self.frame, groups, custom=self.origin.get("custom", ()))
        if groups != ["layer"]:
            rows = rows.sort_values("frobenius", kind="stable", ascending=False, ignore_index=True)
        within = () if rows["targeted"].eq(rows["sites"]).all() else ("targeted",)
        shown = (*groups, "sites", *within, *self.bars, "control_relative", "control_cosine")
        title = self._named(f"Drift by {', '.join(groups)}")
        return WholeFrame.of(rows, title, shown=shown, bars=self.bars)

    def contrast(self, first: str, second: str) -> pd.DataFrame:
        """Compare two roles layer by layer under several norms, beside iid noise and the control.

        See `affectlens.drift.groups.contrast`. With one pair this is descriptive.
        """
        rows = contrast(self.frame, first=first, second=second)
        return WholeFrame.of(rows, self._named(f"{first} against {second}"))

    def neurons(self, site: Site | str) -> pd.DataFrame:
        """Return the drift of each neuron of a gate, up or down projection, after `detail="neurons"`.

        One row a neuron, a row of gate and up or a column of down: `neuron frobenius base_norm relative`.
        Raises `NoSuchSite` for a site without them.
        """
        return self._units(site, "neuron")

    def heads(self, site: Site | str) -> pd.DataFrame:
        """Return the drift of each head of q, k, v or o, after `detail="heads"`.

        One row a head: `head frobenius base_norm relative`. Heads of k and v are those that several query
        heads share. Raises `NoSuchSite` for a site without them.
        """
        return self._units(site, "head")

    def _units(self, site: Site | str, kind: str) -> pd.DataFrame:
        frame = with_units(self.frame, kind)
        keys = [repr(site_of(row)) for row in frame.to_dict("records")]
        names = frame["parameter"].tolist()
        asked = site if isinstance(site, str) else repr(site)
        at = [n for n, (key, name) in enumerate(zip(keys, names, strict=True)) if asked in (key, name)]
        if not at and (same := [key for key, role in zip(keys, frame["role"], strict=True) if role == asked]):
            raise NoSuchSite(
                f"{len(same)} sites with {kind}s have the role {asked}: give a layer, e.g. {same[0]}"
            )
        if len(at) != 1:
            raise NoSuchSite(f"{len(at)} sites with {kind}s are called {asked}. Sites: {near(asked, keys)}")
        row = frame.iloc[at[0]]
        delta, base = (np.asarray(row[f"unit_{name}"], float) for name in ("frobenius", "base_norm"))
        numbers = {"frobenius": delta, "base_norm": base, "relative": over(delta, base)}
        return pd.DataFrame({kind: np.arange(len(delta)), **numbers})
