"""Contrast two roles, layer by layer, so that a claim that hangs on the choice of norm is seen to.

‖Δ‖/‖W‖ says 'gate > up' even of iid noise, since it mostly follows 1/‖W‖. So each norm stands beside
the figure that iid noise of one rms gives, and beside that of the control tuning where there is one.
"""

import numpy as np
import pandas as pd

from affectlens.drift.aggregating import aggregate
from affectlens.errors import NoSuchSite, near

NORMS = ("frobenius", "rms", "relative", "mean_abs", "max_abs")


def contrast(frame: pd.DataFrame, *, first: str, second: str) -> pd.DataFrame:
    """Compare `first` with `second` over the layers of the language tower in which both could move.

    Returns one row a norm: `norm layers layers_known first_larger ratio noise_larger noise_ratio
    control_larger control_ratio`. `layers_known` counts the layers where every figure of the row is
    known, and all run over these: `first_larger` counts layers, `ratio` is the median over layers of
    first/second, infinite where only `first` moved, null where neither did (noise and control run over
    the layers where it is defined). The noise columns hold the expectation for iid noise of one rms
    (null for `max_abs`). The experts of a layer count as one matrix. Raises `NoSuchSite` for a role
    that is not there or that the tuning could not reach.
    """
    one, two = _sides(frame, first, second)
    rows: list[dict[str, float | str]] = []
    for norm in NORMS:
        sides = {"": (one[norm], two[norm]), "noise_": (_noise(one, norm), _noise(two, norm))}
        if f"control_{norm}" in one:
            sides["control_"] = (one[f"control_{norm}"], two[f"control_{norm}"])
        rows.append({"norm": norm, "layers": len(one), **_compared(sides)})
    return pd.DataFrame(rows)


def _sides(frame: pd.DataFrame, first: str, second: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    weights = frame[(frame["tower"] == "language") & (frame["param"] == "weight")]
    # A layer's own: no shared expert, no cross attention, and of an encoder-decoder model the decoder.
    own = weights["layer"].notna() & (weights["label"] == "") & (weights["stack"] != "encoder")
    weights = weights[own]
    roles = sorted(set(weights["role"]))
    for role in (first, second):
        if role not in roles:
            raise NoSuchSite(f"no language layer has role={role!r}. Roles here: {near(role, roles)}")
    layers = weights[weights["role"].isin([first, second])]
    if layers.duplicated(["role", "layer"]).any():
        layers = aggregate(layers, ["role", "layer"])
        # A norm that was not read is no obstacle where nothing moved.
        still = (layers["frobenius"] == 0) & layers["base_norm"].isna()
        layers["relative"] = layers["relative"].mask(still, 0.0)
    # Of a matrix whether, of experts how many: what isn't known to be out of reach is within it.
    reached = layers[layers["targeted"].astype("Float64").fillna(1.0) > 0]
    for role in (first, second):
        if role not in set(reached["role"]):
            raise NoSuchSite(
                f"{role} was not part of the tuning: not targeted, so it could not move, and is no rival"
            )
    one, two = (reached[reached["role"] == role].set_index("layer") for role in (first, second))
    both = one.index.intersection(two.index)
    if both.empty:
        raise NoSuchSite(f"no language layer has both {first} and {second} within reach of the tuning")
    return one.loc[both], two.loc[both]


def _compared(sides: dict[str, tuple[pd.Series, pd.Series]]) -> dict[str, float]:
    """The figures of one norm, all over the same layers."""
    numbers = {prefix: tuple(side.astype(float) for side in pair) for prefix, pair in sides.items()}
    there = {prefix: one.notna() & two.notna() for prefix, (one, two) in numbers.items()}
    known = there[""]
    for each in there.values():
        # What is known nowhere, such as noise's largest value, is left out alone.
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
