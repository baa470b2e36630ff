"""The sums of a change that is given by its factors, Δ = s·B·A, without ever making it.

‖Δ‖² = s²·tr((BᵀB)(AAᵀ)), a matter of rank × rank matrices; its rows and columns likewise. Base is read
once, for its norm and for ⟨W,Δ⟩ = s·Σ (W·Aᵀ)∘B.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from affectlens.checkpoints.adapters.lowrank import LowRank
from affectlens.drift.measuring import squares, values
from affectlens.drift.planning import Part
from affectlens.drift.sums import BESIDE, FIELDS, Sums
from affectlens.sites import Units

Blocks = Callable[[Part], Iterator[tuple[int, int, tuple[Tensor, ...]]]]


def factored(part: Part, blocks: Blocks, *, square: Callable[[Tensor], float]) -> Sums:
    """The sums of a part whose Δ is given by factors; `blocks` reads base, `square` is Σ b² of a block.

    NaN and infinite values of base are counted, and left out of its norm alone.
    """
    strip = part.strip
    assert strip.factors is not None
    delta, control = strip.factors
    rows = slice(part.start, part.stop)
    b, a, _ = delta.factors
    across = a.T.float()
    scale = delta.scale_up_to_alpha
    sums = Sums(
        size=(part.stop - part.start) * strip.width, elementwise=False, scaled=delta.scale is not None
    )
    sums.vector[FIELDS.index("dd")] = scale**2 * _product(delta, delta, rows)
    if control is not None:
        other = control.scale_up_to_alpha
        cc, cd = other**2 * _product(control, control, rows), scale * other * _product(delta, control, rows)
        sums.control = np.array([cc, cd, math.nan, math.nan, 0.0])
        sums.control_scaled = control.scale is not None
    elif len(strip.sides) > 2:  # a control that left this site as it was
        sums.control = np.zeros(len(BESIDE))
    units = strip.units
    if units is not None:
        sums.units = np.zeros((2, units.count))
        sums.units[0] = scale**2 * by_unit(units, _lines(delta, rows, units.dim), first=part.start)[0]
    for start, stop, (base, *_) in blocks(part):
        block = values(base).reshape(stop - start, -1)
        norm = square(block)
        if not math.isfinite(norm):
            finite = torch.isfinite(block)
            sums.nonfinite += int((~finite).sum())
            block = torch.where(finite, block, 0.0)
            norm = square(block)
        if units is not None and sums.units is not None:
            sums.units[1] += by_unit(units, squares(block, block, dim=units.dim), first=start)[1]
        inner = (block @ across.to(block.dtype)).double() * b[start:stop]
        sums.vector[FIELDS.index("bd")] += scale * float(inner.sum())
        sums.vector[FIELDS.index("bb")] += norm
    return sums


def by_unit(units: Units, lines: "NDArray[np.float64]", *, first: int) -> "NDArray[np.float64]":
    """Add rows or columns up by head or neuron; rows begin with number `first`."""
    found = np.zeros((len(lines), units.count))
    begin = first if units.dim == 0 else 0
    numbers = np.arange(begin, begin + lines.shape[1]) // units.size
    for line, total in zip(lines, found, strict=True):
        np.add.at(total, numbers, line)
    return found


def _product(one: LowRank, two: LowRank, rows: slice) -> float:
    """⟨B·A, B'·A'⟩ over some rows, without the scales."""
    (b, a, gram), (c, d, _) = one.factors, two.factors
    across = gram if one is two else a @ d.T
    return float(((b[rows].T @ c[rows]) * across).sum())


def _lines(delta: LowRank, rows: slice, dim: int) -> Any:
    """The squared norm of each row or column of B·A over some rows, as (1, lines)."""
    b, a, gram = delta.factors
    if dim == 0:
        return (((b[rows] @ gram) * b[rows]).sum(1))[None].numpy()
    return (((b[rows].T @ b[rows]) @ a) * a).sum(0)[None].numpy()
