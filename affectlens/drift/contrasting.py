"""Contrast two roles, layer by layer, so that a claim that hangs on the choice of norm is seen to.

‖Δ‖/‖W‖ says 'gate > up' even of iid noise, since it mostly follows 1/‖W‖. So each norm stands beside
the figure that iid noise of one rms gives, and beside that of the control tuning where there is one.
"""

import numpy as np
import pandas as pd

from affectlens.errors import NoSuchSite, near

NORMS = ("frobenius", "rms", "relative", "mean_abs", "max_abs")


def contrast(frame: pd.DataFrame, *, first: str, second: str) -> pd.DataFrame:
    """Compare `first` with `second` over the layers that have both in the language tower.

    Returns one row a norm: `norm layers first_larger ratio noise_larger noise_ratio control_larger
    control_ratio`. `first_larger` counts layers, `ratio` is the median over layers of first/second;
    the noise columns hold the expectation for iid noise of one rms (null for `max_abs`).
    """
    weights = frame[(frame["tower"] == "language") & (frame["param"] == "weight")]
    # A layer's own: no expert, no cross attention, and of an encoder-decoder model the decoder.
    own = weights["expert"].isna() & (weights["label"] == "") & (weights["stack"] != "encoder")
    weights = weights[weights["layer"].notna() & own]
    roles = sorted(set(weights["role"]))
    for role in (first, second):
        if role not in roles:
            raise NoSuchSite(f"no language layer has role={role!r}. Roles here: {near(role, roles)}")
    one, two = (weights[weights["role"] == role].set_index("layer") for role in (first, second))
    layers = one.index.intersection(two.index)
    one, two = one.loc[layers], two.loc[layers]
    rows = []
    for norm in NORMS:
        row = {"norm": norm, "layers": len(layers), **_ratio("", one[norm], two[norm])}
        row |= _ratio("noise_", _noise(one, norm), _noise(two, norm))
        name = f"control_{norm}"
        if name in weights:
            row |= _ratio("control_", one[name], two[name])
        rows.append(row)
    return pd.DataFrame(rows)


def _ratio(prefix: str, one: pd.Series, two: pd.Series) -> dict[str, float]:
    known = one.notna() & two.notna() & (two != 0)
    if not known.any():
        return {f"{prefix}larger" if prefix else "first_larger": np.nan, f"{prefix}ratio": np.nan}
    larger = int((one[known] > two[known]).sum())
    ratio = float((one[known] / two[known]).median())
    return {f"{prefix}larger" if prefix else "first_larger": larger, f"{prefix}ratio": ratio}


def _noise(side: pd.DataFrame, norm: str) -> pd.Series:
    root = np.sqrt(side["size"].astype(float))
    expected = {
        "frobenius": root,
        "relative": root / side["base_norm"],
        "max_abs": np.nan,  # the expected maximum depends on more than the rms
    }
    return pd.Series(expected.get(norm, 1.0), index=side.index)
