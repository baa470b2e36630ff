"""The sums that a pass over a site adds up, and the table of measures computed from them.

With d = t − b only ⟨d,d⟩, ⟨b,b⟩ and ⟨b,d⟩ are summed; ‖t‖² follows from them. The other way round,
‖d‖² from ‖t‖², ‖b‖² and ⟨b,t⟩, would lose every digit of a small drift.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from affectlens.checkpoints import Pairing
from affectlens.drift.parts import Strip
from affectlens.sites import Site

# The vector that the engines fill; `steps` is Σ p² over changed elements, p the power of two at or below |t|.
FIELDS = ("dd", "bb", "bd", "absolute", "steps", "largest", "changed", "sign_flips")
# The sums of the control's change c: ⟨c,c⟩ ⟨c,d⟩ Σ|c| max|c|, and the number of values not finite.
BESIDE = ("cc", "cd", "absolute", "largest", "nonfinite")
# Null for adapters unless they are read element by element: factors don't give single elements.
ELEMENTWISE = ("mean_abs", "max_abs", "changed", "sign_flips", "rounding")
TINY = 1e-37  # values with a smaller product count as zero when signs are compared
_DIGITS = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}  # stored bits of the mantissa
SITE = ("tower", "stack", "layer", "role", "expert", "param", "label")


def _vector() -> NDArray[np.float64]:
    return np.zeros(len(FIELDS))


@dataclass
class Sums:
    """The sums of a site, or of a part of one; parts of a site are merged in their order."""

    size: int = 0
    vector: NDArray[np.float64] = field(default_factory=_vector)
    nonfinite: int = 0  # values on either side; left out of every other sum
    broken: int = 0  # nonfinite values that differ between the sides
    control: NDArray[np.float64] | None = None  # of the control's change c, see BESIDE
    rounds: bool = False  # one side is the other in another dtype
    units: NDArray[np.float64] | None = None  # (2, units): ⟨d,d⟩ and ⟨b,b⟩ of each head or neuron
    custom: dict[str, float] = field(default_factory=dict)
    elementwise: bool = True  # False where the sums come from factors, which don't give single elements
    scaled: bool = True  # False where Δ is known only up to a factor
    control_scaled: bool = True
    read: bool = True  # False where both sides are the same bytes on a hub

    def merge(self, other: "Sums") -> None:
        """Add another part's sums."""
        largest = max(self["largest"], other["largest"])
        self.rounds = other.rounds and (self.rounds or not self.size)
        self.vector = self.vector + other.vector
        self.vector[FIELDS.index("largest")] = largest
        self.size += other.size
        self.elementwise = self.elementwise and other.elementwise
        self.control_scaled = self.control_scaled and other.control_scaled
        self.scaled, self.read = self.scaled and other.scaled, self.read and other.read
        self.nonfinite += other.nonfinite
        self.broken += other.broken
        self.control = _with(self.control, other.control)
        self.units = _plus(self.units, other.units)
        for name, value in other.custom.items():
            self.custom[name] = self.custom.get(name, 0.0) + value

    def __getitem__(self, name: str) -> float:
        return float(self.vector[FIELDS.index(name)])

    @property
    def identical(self) -> bool:
        """Whether all values are equal; NaN equals NaN."""
        return not self["changed"] and not self["dd"] and not self.broken


def columns(sums: Sums, *, dtype: str = "float32") -> dict[str, float | int]:
    """Compute the measure columns of `Drift`; `dtype` is that of the tuned side as stored."""
    finite = float(sums.size - sums.nonfinite)
    frobenius, base_norm = math.sqrt(sums["dd"]), math.sqrt(sums["bb"])
    tuned_norm = math.sqrt(max(sums["bb"] + 2 * sums["bd"] + sums["dd"], 0.0))
    product = base_norm * tuned_norm
    step = 2.0 ** -_DIGITS[dtype] if dtype in _DIGITS else math.nan
    row: dict[str, float | int] = {
        "frobenius": frobenius,
        "base_norm": base_norm,
        "tuned_norm": tuned_norm if sums.scaled and sums.read else math.nan,
        "relative": ratio(frobenius, base_norm),
        "rms": ratio(frobenius, math.sqrt(finite)),
        "mean_abs": ratio(sums["absolute"], finite),
        "max_abs": sums["largest"],
        "cosine": _clipped(ratio(sums["bb"] + sums["bd"], product)),
        "changed": int(sums["changed"]),
        "sign_flips": int(sums["sign_flips"]),
        "nonfinite": sums.nonfinite,
        # An error uniform within half a step has a variance of step²/12.
        "rounding": math.sqrt(sums["steps"] / 12) * step,
    }
    if not sums.elementwise:
        row |= dict.fromkeys(ELEMENTWISE, math.nan)
    if not sums.scaled:
        row["cosine"] = math.nan
    if not sums.read:
        row |= {"base_norm": math.nan, "relative": 0.0, "rounding": math.nan}
    if sums.control is not None:
        row |= _beside(sums, frobenius, base_norm, finite)
        if not sums.control_scaled:  # its direction is known, but not its length
            row |= dict.fromkeys(("control_frobenius", "control_relative", "control_rms"), math.nan)
    return row | sums.custom


_NUMBERS = ("layer", "expert")
_COUNTS = ("changed", "sign_flips")  # null where factors don't give single elements


def _plus(one: Any, two: Any) -> Any:
    return two if one is None else one if two is None else one + two


def _with(one: NDArray[np.float64] | None, two: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    found: NDArray[np.float64] | None = _plus(one, two)
    if one is not None and two is not None and found is not None:
        found[3] = max(one[3], two[3])
    return found


def _beside(sums: Sums, frobenius: float, base_norm: float, finite: float) -> dict[str, float]:
    """Compute the control's change, the part of Δ along it, ⟨Δ,Δ_c⟩/‖Δ_c‖, and the rest of Δ."""
    assert sums.control is not None
    cc, cd, total, largest, lost = map(float, sums.control)
    moved = math.sqrt(cc)
    along = ratio(cd, moved) if moved else 0.0
    return {
        "control_frobenius": moved,
        "control_relative": ratio(moved, base_norm),
        "control_rms": ratio(moved, math.sqrt(finite)),
        "control_mean_abs": ratio(total, finite),
        "control_max_abs": largest,
        "control_nonfinite": int(lost),
        "control_cosine": _clipped(ratio(cd, frobenius * moved)),
        "control_along": along,
        "control_residual": math.sqrt(max(sums["dd"] - along**2, 0.0)),
    }


def ratio(part: float, whole: float) -> float:
    """Return `part / whole`, NaN where the whole is zero."""
    return part / whole if whole else math.nan


def _clipped(cosine: float) -> float:
    return cosine if math.isnan(cosine) else min(1.0, max(-1.0, cosine))


RESERVED = frozenset(columns(Sums(control=np.zeros(len(BESIDE))))) | {
    "parameter",
    *SITE,
    "size",
    "dtype",
    "targeted",
}


def frame(
    found: Mapping[Strip, Sums], pairing: Pairing, *, beside: Mapping[Site, Mapping[str, Any]]
) -> pd.DataFrame:
    """Make the table: one row a site, in order; `beside` holds more columns for some sites."""
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
    """Return norms by head or neuron as arrays: a list would hold an object for each of thousands."""
    if strip.units is None or sums.units is None:
        return {}
    delta, base = np.sqrt(sums.units).clip(max=np.finfo(np.float32).max).astype(np.float32)
    return {"unit": strip.units.kind, "unit_frobenius": delta, "unit_base_norm": base}
