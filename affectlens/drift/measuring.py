"""All measures of one site in one pass: float32 blocks, float64 sums.

With d = t − b only ⟨d,d⟩, ⟨b,b⟩ and ⟨b,d⟩ are summed; ‖t‖² follows from them. The other way round,
‖d‖² from ‖t‖², ‖b‖² and ⟨b,t⟩, would lose every digit of a small drift.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements: three float32 blocks stay in a core's cache
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Sums:
    """What one pass adds up over the elements of a site."""

    size: int = 0
    dd: float = 0.0
    bb: float = 0.0
    bd: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0
    changed: int = 0
    sign_flips: int = 0
    nonfinite: int = 0
    cc: float = 0.0  # of the control's change
    cd: float = 0.0


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, so that NaN equals NaN and 0.0 is not −0.0."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    kind = _BITS[one.element_size()]
    return torch.equal(one.contiguous().view(kind), two.contiguous().view(kind))


def measure(base: Tensor, tuned: Tensor, *, control: Tensor | None = None) -> dict[str, float | int]:
    """Measure how far `tuned` lies from `base`, tensors of one shape.

    Returns the measure columns of `Drift`. Elements that are NaN or infinite on either side are
    counted as `nonfinite` and left out of every other measure.
    """
    sums = Sums(size=base.numel())
    if control is None and same_bits(base, tuned):
        for (block,) in _blocks(base):
            _add_still(sums, block)
    else:
        sides = (base, tuned) if control is None else (base, tuned, control)
        for blocks in _blocks(*sides):
            _add(sums, *blocks)
    return _measures(sums, control is not None)


def _blocks(*sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [side.reshape(-1) for side in sides]
    for start in range(0, flat[0].numel(), BLOCK):
        yield tuple(side[start : start + BLOCK].float() for side in flat)


def _add_still(sums: Sums, b: Tensor) -> None:
    finite = torch.isfinite(b)
    count = int(finite.sum())
    if count < b.numel():
        sums.nonfinite += b.numel() - count
        b = b[finite]
    sums.bb += _dot(b, b)


def _add(sums: Sums, b: Tensor, t: Tensor, c: Tensor | None = None) -> None:
    finite = torch.isfinite(b) & torch.isfinite(t)
    count = int(finite.sum())
    if count < b.numel():
        sums.nonfinite += b.numel() - count
        b, t, c = b[finite], t[finite], None if c is None else c[finite]
    if not count:
        return
    d = t - b
    sums.dd += _dot(d, d)
    sums.bb += _dot(b, b)
    sums.bd += _dot(b, d)
    sums.changed += int((d != 0).sum())
    sums.sign_flips += int(((b < 0) & (t > 0) | (b > 0) & (t < 0)).sum())
    d_abs = d.abs()
    sums.absolute += float(d_abs.sum(dtype=torch.float64))
    sums.largest = max(sums.largest, float(d_abs.max()))
    if c is not None:
        # What the control lost is no matter of the pair: leave those elements out of its sums alone.
        e = torch.where(torch.isfinite(c), c - b, 0.0)
        sums.cc += _dot(e, e)
        sums.cd += _dot(e, d)


def _dot(x: Tensor, y: Tensor) -> float:
    # Squares of float32 numbers overflow float32 and lose digits in it: sum in float64.
    return float(torch.dot(x.double(), y.double()))


def _measures(sums: Sums, control: bool) -> dict[str, float | int]:
    finite = float(sums.size - sums.nonfinite)
    frobenius, base_norm = math.sqrt(sums.dd), math.sqrt(sums.bb)
    tuned_norm = math.sqrt(max(sums.bb + 2 * sums.bd + sums.dd, 0.0))
    product = base_norm * tuned_norm
    row: dict[str, float | int] = {
        "frobenius": frobenius,
        "base_norm": base_norm,
        "relative": _ratio(frobenius, base_norm),
        "rms": _ratio(frobenius, math.sqrt(finite)),
        "mean_abs": _ratio(sums.absolute, finite),
        "max_abs": sums.largest,
        "cosine": min(1.0, max(-1.0, _ratio(sums.bb + sums.bd, product))) if product else math.nan,
        "changed": sums.changed,
        "sign_flips": sums.sign_flips,
        "nonfinite": sums.nonfinite,
    }
    if control:
        moved = math.sqrt(sums.cc)
        row["control_frobenius"] = moved
        row["control_relative"] = _ratio(moved, base_norm)
        row["control_rms"] = _ratio(moved, math.sqrt(finite))
        row["control_cosine"] = _ratio(sums.cd, frobenius * moved)
    return row


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
