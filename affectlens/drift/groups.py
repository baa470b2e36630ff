"""Aggregate rows of sites by group: sums of squares for norms, never means of ratios.

A mean of ratios would weigh small tensors like large ones. A sum is null where one of its parts is null.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from affectlens.errors import NoSuchSite, TableError, near
from affectlens.table import site_of

KEYS = ("site", "tower", "stack", "layer", "role", "expert", "param")
UNITS = ("head", "neuron")
ARRAYS = ["unit_frobenius", "unit_base_norm"]
Numbers = NDArray[np.float64]
NORMS = ("frobenius", "rms", "relative", "mean_abs", "max_abs")


def parsed(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Split group names given apart or with commas; raises `TableError` for an unknown one."""
    groups = list(dict.fromkeys(part.strip() for name in names for part in name.split(",")))
    for name in groups or [""]:
        if name not in known:
            raise TableError(f"can't aggregate by {name!r}. By: {near(name, known, most=len(known))}")
    if set(UNITS) <= set(groups):
        raise TableError(
            "can't aggregate by 'head' and 'neuron' at once: no matrix has both. Give one of them"
        )
    return groups


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows grouped by the values of some columns; each method gives one number a group, in their order."""

    keys: pd.DataFrame
    codes: NDArray[np.integer[Any]]

    @classmethod
    def of(cls, frame: pd.DataFrame, names: Sequence[str]) -> "Groups":
        """Group a frame by columns; rows without a value there form their own group."""
        if "site" in names:
            frame = frame.assign(site=[repr(site_of(row)) for row in frame.to_dict("records")])
        codes = frame.groupby(list(names), dropna=False, sort=True).ngroup().to_numpy()
        _, first = np.unique(codes, return_index=True)
        return cls(frame[list(names)].iloc[first].reset_index(drop=True), codes)

    def sum(self, values: pd.Series, *, over: pd.Series | None = None) -> Numbers:
        """Add up the values of each group, null where one is null; only rows in `over` count."""
        numbers = values.to_numpy(dtype=float, na_value=np.nan)
        kept = numbers if over is None else np.where(over.to_numpy(dtype=bool), numbers, 0.0)
        return np.bincount(self.codes, weights=kept, minlength=len(self.keys)).astype(float)

    def root(self, norms: pd.Series, *, over: pd.Series | None = None) -> Numbers:
        """Return √Σ‖·‖² of each group."""
        return np.sqrt(self.sum(norms.astype(float) ** 2, over=over))

    def count(self, rows: pd.Series) -> NDArray[np.int64]:
        """Count the true rows of each group."""
        return self.sum(rows).astype(np.int64)

    def largest(self, values: pd.Series) -> Numbers:
        """Return the largest value of each group, null where one is null."""
        found = np.full(len(self.keys), -np.inf)
        np.maximum.at(found, self.codes, values.to_numpy(dtype=float, na_value=-np.inf))
        return np.where(self.count(values.isna()) > 0, np.nan, found)


def over(part: Numbers, whole: Numbers) -> Numbers:
    """Return `part / whole`, null where the whole is not positive."""
    found = np.full(len(part), np.nan)
    np.divide(part, whole, out=found, where=whole > 0)
    return found


def norms(frame: pd.DataFrame, groups: Groups) -> pd.DataFrame:
    """Compute the columns of every aggregate: how many sites, how large, how far from base.

    `targeted` counts the sites that the tuning could reach: where it is 0 nothing could move.
    """
    size, dd = groups.sum(frame["size"]), groups.root(frame["frobenius"])
    known = frame["base_norm"].notna()
    base = groups.root(frame["base_norm"], over=known)
    sites, read = groups.count(frame["size"].notna()), groups.count(known)
    found: dict[str, NDArray[np.generic]] = {"sites": sites, "size": size.astype(np.int64)}
    if "targeted" in frame:
        # Older tables don't have it for every site: count those as within reach.
        found["targeted"] = groups.count(frame["targeted"].astype("boolean").fillna(True))
    lost = groups.sum(frame["nonfinite"]) if "nonfinite" in frame else np.zeros(len(size))
    found |= {
        "frobenius": dd,
        "base_norm": np.where(read > 0, base, np.nan),
        "relative": over(groups.root(frame["frobenius"], over=known), base),
        "rms": over(dd, np.sqrt(size - lost)),
    }
    if (read < sites).any():
        found["norms_known"] = read  # the ratio runs over these sites alone
    return groups.keys.assign(**found)


def aggregate(frame: pd.DataFrame, names: Sequence[str], *, custom: Iterable[str] = ()) -> pd.DataFrame:
    """Aggregate the rows of a drift: one row a group, in the order of the groups."""
    groups = Groups.of(frame, names)
    rows = norms(frame, groups)
    found: dict[str, Numbers] = {}
    finite = (frame["size"] - frame["nonfinite"]).astype(float)
    found["mean_abs"] = over(groups.sum(frame["mean_abs"] * finite), groups.sum(finite))
    found["max_abs"] = groups.largest(frame["max_abs"])
    found |= {name: groups.sum(frame[name]) for name in ("changed", "sign_flips", "nonfinite")}
    if "tuned_norm" in frame:
        found["cosine"] = _cosine(frame, groups)
    if "rounding" in frame:
        rounding = groups.root(frame["rounding"])
        # Sites out of reach were not rounded: they are base's, as stored.
        found["rounding"] = np.where(rows.get("targeted", 1) == 0, np.nan, rounding)
    if "control_frobenius" in frame:
        found |= _control(frame, groups)
    if "aligned_frobenius" in frame:
        known = frame["aligned_frobenius"].notna() & frame["base_norm"].notna()
        aligned = groups.root(frame["aligned_frobenius"], over=known)
        found["aligned_frobenius"] = np.where(groups.count(known) > 0, aligned, np.nan)
        found["aligned_relative"] = over(aligned, groups.root(frame["base_norm"], over=known))
    found |= {name: groups.sum(frame[name]) for name in custom if name in frame}
    rows = rows.assign(**found)
    whole = [name for name in ("changed", "sign_flips", "nonfinite") if rows[name].notna().all()]
    return rows.astype(dict.fromkeys(whole, "int64"))


def with_units(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the sites with heads or neurons; raises `NoSuchSite`, with the reason, if there are none."""
    there = frame[frame["unit"] == kind] if "unit" in frame else frame[:0]
    if there.empty:
        raise NoSuchSite(f"this drift has no {kind}s: make it with diff(…, detail='{kind}s')")
    if not set(ARRAYS) <= set(frame):
        raise NoSuchSite(
            f"this drift was saved without arrays and so without {kind}s: save it as .parquet or .json"
        )
    return there


def unfolded(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return one row a head or neuron of each site that has them; raises `TableError` if none has."""
    try:
        there = with_units(frame, kind)
    except NoSuchSite as error:
        raise TableError(f"can't aggregate by {kind!r}: {error}") from None
    counts = np.array([len(array) for array in there["unit_frobenius"]])
    rows = there.loc[there.index.repeat(counts)].reset_index(drop=True)
    delta, base = (np.concatenate([*there[name]]).astype(float) for name in ARRAYS)
    size = np.repeat(there["size"].to_numpy() // counts, counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    kept = rows.drop(columns=[*ARRAYS, "nonfinite"], errors="ignore")
    return kept.assign(**{kind: numbers, "size": size, "frobenius": delta, "base_norm": base})


def contrast(frame: pd.DataFrame, *, first: str, second: str) -> pd.DataFrame:
    """Compare `first` with `second` over the layers of the language tower in which both could move.

    Returns one row a norm: `norm layers layers_known first_larger ratio noise_larger noise_ratio
    control_larger control_ratio`. `layers_known` counts the layers where every figure of the row is
    known, and all figures use only these: `first_larger` counts layers, `ratio` is the median over layers
    of first/second, infinite where only `first` moved, null where neither did (noise and control use the
    layers where it is defined). The noise columns hold the expectation for iid noise of one rms (null for
    `max_abs`). The experts of a layer count as one matrix. Raises `NoSuchSite` for a role that is missing
    or that the tuning could not reach.
    """
    one, two = _sides(frame, first, second)
    rows: list[dict[str, float | str]] = []
    for norm in NORMS:
        sides = {"": (one[norm], two[norm]), "noise_": (_noise(one, norm), _noise(two, norm))}
        if f"control_{norm}" in one:
            sides["control_"] = (one[f"control_{norm}"], two[f"control_{norm}"])
        rows.append({"norm": norm, "layers": len(one), **_compared(sides)})
    return pd.DataFrame(rows)


def _cosine(frame: pd.DataFrame, groups: Groups) -> Numbers:
    """Return the cosine from the sum of ⟨W_base, W_tuned⟩; a zero side has no angle and adds nothing."""
    product = (frame["base_norm"] * frame["tuned_norm"]).astype(float)
    inner = (frame["cosine"] * product).mask(product == 0, 0.0)
    whole = groups.root(frame["base_norm"]) * groups.root(frame["tuned_norm"])
    return np.clip(over(groups.sum(inner), whole), -1.0, 1.0)


def _control(frame: pd.DataFrame, groups: Groups) -> dict[str, Numbers]:
    """Compute the control's norms over the sites it has: over all sites its ratios would be too small."""
    known = frame["control_frobenius"].notna()
    weighed, there = known & frame["base_norm"].notna(), groups.count(known) > 0
    moved = np.where(there, groups.root(frame["control_frobenius"], over=known), np.nan)
    size = groups.sum(frame["size"], over=known)
    base = groups.root(frame["base_norm"], over=weighed)
    found = {
        "control_frobenius": moved,
        "control_relative": over(groups.root(frame["control_frobenius"], over=weighed), base),
        "control_rms": over(moved, np.sqrt(size)),
    }
    if "control_mean_abs" in frame:
        found["control_mean_abs"] = over(groups.sum(frame["control_mean_abs"] * frame["size"]), size)
        found["control_max_abs"] = groups.largest(frame["control_max_abs"])
    if "control_along" in frame:
        own = groups.root(frame["frobenius"], over=known)
        # Inner products add up, angles don't.
        inner = groups.sum(frame["control_along"] * frame["control_frobenius"], over=known)
        along = np.where(moved > 0, over(inner, moved), moved)  # 0 for a control that did not move
        found["control_cosine"] = over(inner, own * moved)
        found["control_along"] = along
        found["control_residual"] = np.sqrt(np.maximum(own**2 - along**2, 0.0))
    return found


def _sides(frame: pd.DataFrame, first: str, second: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    weights = frame[(frame["tower"] == "language") & (frame["param"] == "weight")]
    # Leave out shared experts, cross attention and encoders: a layer has one matrix of each role.
    own = weights["layer"].notna() & (weights["label"] == "") & (weights["stack"] != "encoder")
    weights = weights[own]
    roles = sorted(set(weights["role"]))
    for role in (first, second):
        if role not in roles:
            raise NoSuchSite(f"no language layer has role={role!r}. Roles here: {near(role, roles)}")
    layers = weights[weights["role"].isin([first, second])]
    if layers.duplicated(["role", "layer"]).any():
        layers = aggregate(layers, ["role", "layer"])
        # Where nothing moved the relative drift is 0, even if the norm was not read.
        still = (layers["frobenius"] == 0) & layers["base_norm"].isna()
        layers["relative"] = layers["relative"].mask(still, 0.0)
    # A flag for a matrix, a count for experts; unknown counts as within reach.
    reached = layers[layers["targeted"].astype("Float64").fillna(1.0) > 0]
    for role in (first, second):
        if role not in set(reached["role"]):
            raise NoSuchSite(
                f"{role} was not part of the tuning: not targeted, so it could not move. Compare other roles"
            )
    one, two = (reached[reached["role"] == role].set_index("layer") for role in (first, second))
    both = one.index.intersection(two.index)
    if both.empty:
        raise NoSuchSite(f"no language layer has both {first} and {second} within reach of the tuning")
    return one.loc[both], two.loc[both]


def _compared(sides: dict[str, tuple[pd.Series, pd.Series]]) -> dict[str, float]:
    """Compare the sides by one norm, all figures over the same layers."""
    numbers = {prefix: tuple(side.astype(float) for side in pair) for prefix, pair in sides.items()}
    there = {prefix: one.notna() & two.notna() for prefix, (one, two) in numbers.items()}
    known = there[""]
    for each in there.values():
        # A figure known in no layer, such as noise's largest value, must not empty the others.
        known = known & each if (known & each).any() else known
    found: dict[str, float] = {"layers_known": int(known.sum())}
    one, two = numbers[""]
    moved = known & ((one != 0) | (two != 0))
    defined = moved if moved.any() else known
    for prefix, (one, two) in numbers.items():
        told = bool(known.any()) and bool(there[prefix][known].all())
        found[f"{prefix}larger" if prefix else "first_larger"] = (
            int((one[known] > two[known]).sum()) if told else np.nan
        )
        # 0/0 is null, and x/0 infinite.
        found[f"{prefix}ratio"] = float((one / two)[defined].median()) if told else np.nan
    return found


def _noise(side: pd.DataFrame, norm: str) -> pd.Series:
    root = np.sqrt(side["size"].astype(float))
    expected = {
        "frobenius": root,
        "relative": root / side["base_norm"].where(side["base_norm"] > 0),
        "max_abs": np.nan,  # the expected maximum depends on more than the rms
    }
    return pd.Series(expected.get(norm, 1.0), index=side.index)
