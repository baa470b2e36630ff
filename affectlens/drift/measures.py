"""The sums that a pass over a site adds up, and the table of measures computed from them.

With d = t − b only ⟨d,d⟩, ⟨b,b⟩ and ⟨b,d⟩ are summed; ‖t‖² follows from them. The other way round,
‖d‖² from ‖t‖², ‖b‖² and ⟨b,t⟩, would lose every digit of a small drift.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from affectlens.checkpoints import Pairing
from affectlens.drift.parts import Strip
from affectlens.sites import Site


class Field(IntEnum):
    """A place in the vector of sums that an engine fills.

    `STEPS` is Σ p² over changed elements, p the power of two at or below |t|.
    """

    DD = 0
    BB = 1
    BD = 2
    ABSOLUTE = 3
    STEPS = 4
    LARGEST = 5
    CHANGED = 6
    SIGN_FLIPS = 7


class ControlField(IntEnum):
    """A place in the sums of the control's change c; `NONFINITE` counts its values that are not finite."""

    CC = 0
    CD = 1
    ABSOLUTE = 2
    LARGEST = 3
    NONFINITE = 4


FIELDS = tuple(place.name.lower() for place in Field)
BESIDE = tuple(place.name.lower() for place in ControlField)
TINY = 1e-37  # values with a smaller product count as zero when signs are compared
_DIGITS = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}  # stored bits of the mantissa
Vector = NDArray[np.float64]
Words = NDArray[Any]
Measure = Callable[[Tensor, Tensor], float]  # of two float32 blocks, base and tuned
SITE = ("tower", "stack", "layer", "role", "expert", "param", "label")


class Engine(Protocol):
    """Adds up blocks of raw words; `numba_engine` and `torch_engine` are engines.

    A word holds two values of a side. NaN in the sums says that some value is not finite.
    """

    def measure(self, sides: tuple[Words, Words], sums: Vector) -> None:
        """Add the sums of FIELDS for (base, tuned)."""

    def still(self, base: Words, sums: Vector) -> None:
        """Add the sums of two sides known to be equal, of which one is read."""

    def beside(self, sides: tuple[Words, ...], sums: Vector) -> None:
        """Add the sums of BESIDE for (base, tuned, control)."""


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
        self.vector[Field.LARGEST] = largest
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
        return float(self.vector[Field[name.upper()]])

    @property
    def identical(self) -> bool:
        """Whether all values are equal; NaN equals NaN."""
        return not self["changed"] and not self["dd"] and not self.broken

    @property
    def finite(self) -> float:
        """The number of elements that are finite on both sides."""
        return float(self.size - self.nonfinite)

    @property
    def frobenius(self) -> float:
        """‖Δ‖."""
        return math.sqrt(self["dd"])

    @property
    def base_norm(self) -> float:
        """‖W_base‖."""
        return math.sqrt(self["bb"])

    @property
    def tuned_norm(self) -> float:
        """‖W_tuned‖, from ‖W_base‖², ⟨W_base,Δ⟩ and ‖Δ‖²."""
        return math.sqrt(max(self["bb"] + 2 * self["bd"] + self["dd"], 0.0))

    def beside(self, place: ControlField) -> float:
        """Return a sum of the control's change; NaN without a control."""
        return math.nan if self.control is None else float(self.control[place])


@dataclass(frozen=True)
class Measured:
    """A column of `Drift`: a function of the sums and of tuned's stored dtype, and what it needs.

    `needs` names flags of `Sums`; where one of them is false the column is null.
    """

    of: Callable[[Sums, str], float | int]
    needs: tuple[str, ...] = ()

    def value(self, sums: Sums, dtype: str) -> float | int:
        """Return the value for a site, NaN where a need is not met."""
        return self.of(sums, dtype) if all(getattr(sums, need) for need in self.needs) else math.nan


def columns(sums: Sums, *, dtype: str = "float32") -> dict[str, float | int]:
    """Compute the measure columns of `Drift`; `dtype` is that of the tuned side as stored."""
    tables = (COLUMNS,) if sums.control is None else (COLUMNS, CONTROL)
    row = {name: column.value(sums, dtype) for table in tables for name, column in table.items()}
    return row | sums.custom


def ratio(part: float, whole: float) -> float:
    """Return `part / whole`, NaN where the whole is zero."""
    return part / whole if whole else math.nan


def _clipped(cosine: float) -> float:
    return cosine if math.isnan(cosine) else min(1.0, max(-1.0, cosine))


def _rounding(sums: Sums, dtype: str) -> float:
    # An error uniform within half a step has a variance of step²/12.
    step = 2.0 ** -_DIGITS[dtype] if dtype in _DIGITS else math.nan
    return math.sqrt(sums["steps"] / 12) * step


def _cosine(sums: Sums, _: str) -> float:
    return _clipped(ratio(sums["bb"] + sums["bd"], sums.base_norm * sums.tuned_norm))


def _moved(sums: Sums, _: str = "") -> float:
    """Return ‖Δ_c‖ of the control."""
    return math.sqrt(sums.beside(ControlField.CC))


def _along(sums: Sums, _: str = "") -> float:
    """Return the length of Δ along the control's change, ⟨Δ,Δ_c⟩/‖Δ_c‖."""
    return ratio(sums.beside(ControlField.CD), _moved(sums)) if _moved(sums) else 0.0


def _residual(sums: Sums, _: str) -> float:
    return math.sqrt(max(sums["dd"] - _along(sums) ** 2, 0.0))


# A measure from sums that the engines take is a row here; the order is that of the columns.
COLUMNS: dict[str, Measured] = {
    "frobenius": Measured(lambda sums, _: sums.frobenius),
    "base_norm": Measured(lambda sums, _: sums.base_norm, needs=("read",)),
    "tuned_norm": Measured(lambda sums, _: sums.tuned_norm, needs=("scaled", "read")),
    "relative": Measured(lambda sums, _: ratio(sums.frobenius, sums.base_norm) if sums.read else 0.0),
    "rms": Measured(lambda sums, _: ratio(sums.frobenius, math.sqrt(sums.finite))),
    "mean_abs": Measured(lambda sums, _: ratio(sums["absolute"], sums.finite), needs=("elementwise",)),
    "max_abs": Measured(lambda sums, _: sums["largest"], needs=("elementwise",)),
    "cosine": Measured(_cosine, needs=("scaled",)),
    "changed": Measured(lambda sums, _: int(sums["changed"]), needs=("elementwise",)),
    "sign_flips": Measured(lambda sums, _: int(sums["sign_flips"]), needs=("elementwise",)),
    "nonfinite": Measured(lambda sums, _: sums.nonfinite),
    "rounding": Measured(_rounding, needs=("elementwise", "read")),
}
CONTROL: dict[str, Measured] = {
    "control_frobenius": Measured(_moved, needs=("control_scaled",)),
    "control_relative": Measured(lambda s, _: ratio(_moved(s), s.base_norm), needs=("control_scaled",)),
    "control_rms": Measured(lambda s, _: ratio(_moved(s), math.sqrt(s.finite)), needs=("control_scaled",)),
    "control_mean_abs": Measured(lambda sums, _: ratio(sums.beside(ControlField.ABSOLUTE), sums.finite)),
    "control_max_abs": Measured(lambda sums, _: sums.beside(ControlField.LARGEST)),
    "control_nonfinite": Measured(lambda sums, _: int(sums.beside(ControlField.NONFINITE))),
    "control_cosine": Measured(
        lambda s, _: _clipped(ratio(s.beside(ControlField.CD), s.frobenius * _moved(s)))
    ),
    "control_along": Measured(_along),
    "control_residual": Measured(_residual),
}
# A measure that needs other sums is a row here, a function of two blocks whose values are added up.
# Every diff then reads all values of both sides, once more.
BLOCKWISE: dict[str, Measure] = {}
# Null for adapters unless they are read element by element: factors don't give single elements.
ELEMENTWISE = tuple(name for name, column in COLUMNS.items() if "elementwise" in column.needs)
RESERVED = frozenset({"parameter", *SITE, "size", "dtype", "targeted", *COLUMNS, *CONTROL, *BLOCKWISE})
_NUMBERS = ("layer", "expert")
_COUNTS = ("changed", "sign_flips")  # null where factors don't give single elements


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
    site, dtypes = strip.site, [side.dtype(strip.site) for side in strip.sides[:2]]
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


def _plus(one: Any, two: Any) -> Any:
    return two if one is None else one if two is None else one + two


def _with(one: Vector | None, two: Vector | None) -> Vector | None:
    found: Vector | None = _plus(one, two)
    if one is not None and two is not None and found is not None:
        found[ControlField.LARGEST] = max(one[ControlField.LARGEST], two[ControlField.LARGEST])
    return found
