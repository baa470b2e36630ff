"""From sums to the rows of a drift table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from affectlens.checkpoints import Pairing
from affectlens.drift.planning import Strip
from affectlens.drift.sums import BESIDE, Sums, columns
from affectlens.sites import Site

SITE = ("tower", "stack", "layer", "role", "expert", "param", "label")
RESERVED = frozenset(columns(Sums(control=np.zeros(len(BESIDE))))) | {
    "parameter",
    *SITE,
    "size",
    "dtype",
    "targeted",
}
_NUMBERS = ("layer", "expert")
_COUNTS = ("changed", "sign_flips")  # null where factors say nothing of single elements


def frame(
    found: Mapping[Strip, Sums], pairing: Pairing, *, beside: Mapping[Site, Mapping[str, Any]]
) -> pd.DataFrame:
    """One row a site, in order; `beside` holds further columns of some sites."""
    rows = [
        {**_row(strip, sums, pairing), **_units(strip, sums), **beside.get(strip.site, {})}
        for strip, sums in found.items()
    ]
    table = pd.DataFrame(rows)
    for name in (*_NUMBERS, *(name for name in _COUNTS if table[name].isna().any())):
        table[name] = table[name].astype("Int64")
    return table


def _row(strip: Strip, sums: Sums, pairing: Pairing) -> dict[str, Any]:
    site, dtypes = strip.site, [side.dtype(strip.site) for side in (pairing.base, pairing.tuned)]
    return {
        "parameter": site.parameter,
        **{name: getattr(site, name) for name in SITE},
        "size": strip.size,
        "dtype": " → ".join(dict.fromkeys(dtypes)),
        **columns(sums, dtype=dtypes[1]),
        "targeted": pairing.tuned.targeted(site),
    }


def _units(strip: Strip, sums: Sums) -> dict[str, Any]:
    """Norms by head or neuron, as arrays: a cell holds thousands of numbers and no object for each."""
    if strip.units is None or sums.units is None:
        return {}
    delta, base = np.sqrt(sums.units).clip(max=np.finfo(np.float32).max).astype(np.float32)
    return {"unit": strip.units.kind, "unit_frobenius": delta, "unit_base_norm": base}
