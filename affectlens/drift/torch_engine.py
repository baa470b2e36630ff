"""The engine in torch: blocks of float32 or float64, sums in float64.

It is the reference for the compiled engine, its replacement where there is no compiler, and it measures
the blocks that hold NaN, infinity or numbers too large to square in float32.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from affectlens.checkpoints.slicing import same_bits
from affectlens.drift.measures import BESIDE, TINY, ControlField, Field, Sums

BLOCK = 1 << 16  # elements: a few float32 blocks stay in a core's cache
_EXACT = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds their values without loss
_KINDS = {"uint32": torch.bfloat16, "int32": torch.float16, "uint64": torch.float32}


def measure_tensors(base: Tensor, tuned: Tensor, *, control: Tensor | None = None) -> Sums:
    """Sum up how far `tuned` is from `base`, tensors of one shape.

    Elements that are NaN or infinite on either side are counted as `nonfinite` and left out of every
    other sum; those of the control are left out of its sums alone.
    """
    sums = Sums(size=base.numel())
    if control is not None:
        sums.control = np.zeros(len(BESIDE))
    for b, t, c in _blocks(base, tuned, control):
        _add(sums, values(b), values(t), None if c is None else values(c))
    sums.rounds = only_rounded(base, tuned)
    return sums


def only_rounded(base: Tensor, tuned: Tensor) -> bool:
    """Return whether one side is the other saved in another dtype."""
    if base.dtype == tuned.dtype:
        return False
    return same_bits(base.to(tuned.dtype), tuned) or same_bits(base, tuned.to(base.dtype))


def alike(sides: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Convert all sides to complex numbers if one of them is complex."""
    if not any(side.is_complex() for side in sides):
        return sides
    return tuple(side.to(torch.complex128) for side in sides)


def values(block: Tensor) -> Tensor:
    """Convert a block to float32, or to float64 where float32 would lose digits."""
    if block.is_complex():
        block = torch.view_as_real(block).flatten(-2)
    small = block.dtype in _EXACT or (block.element_size() == 1)
    return block.float() if small else block.double()


def _blocks(base: Tensor, tuned: Tensor, control: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    flat = [None if side is None else side.reshape(-1) for side in (base, tuned, control)]
    for start in range(0, base.numel(), BLOCK):
        yield tuple(None if side is None else side[start : start + BLOCK] for side in flat)  # type: ignore[misc]


def _add(sums: Sums, b: Tensor, t: Tensor, c: Tensor | None) -> None:
    finite = torch.isfinite(b) & torch.isfinite(t)
    count = int(finite.sum())
    if count < b.numel():
        sums.nonfinite += b.numel() - count
        lost = ~finite
        sums.broken += int((~((b == t) | (b.isnan() & t.isnan())))[lost].sum())
        b, t, c = b[finite], t[finite], None if c is None else c[finite]
    if not count:
        return
    d = t - b
    wide = d.double()
    power = torch.ldexp(torch.ones_like(wide), torch.frexp(t.double()).exponent - 1)
    power = torch.where((t == 0) | (d == 0), 0.0, power)
    found = [
        torch.dot(wide, wide),
        torch.dot(b.double(), b.double()),
        torch.dot(b.double(), wide),
        wide.abs().sum(),
        torch.dot(power, power),
        wide.abs().max(),
        (d != 0).sum(),
        (b.double() * t.double() < -TINY).sum(),
    ]
    before = sums.vector[Field.LARGEST]
    sums.vector = sums.vector + np.array([float(value) for value in found])
    sums.vector[Field.LARGEST] = max(before, float(found[Field.LARGEST]))
    if c is not None and sums.control is not None:
        # A NaN of the control must not drop the element from the sums of the pair.
        known = torch.isfinite(c)
        e = torch.where(known, c - b, 0.0).double()
        largest = max(float(sums.control[ControlField.LARGEST]), float(e.abs().max()))
        added = [torch.dot(e, e), torch.dot(e, wide), e.abs().sum(), torch.zeros(()), (~known).sum()]
        sums.control = sums.control + np.array([float(value) for value in added])
        sums.control[ControlField.LARGEST] = largest


def squares(base: Tensor, tuned: Tensor, *, dim: int) -> NDArray[np.float64]:
    """Return ⟨d,d⟩ and ⟨b,b⟩ of each row (`dim` 0) or column (1) of two matrices: (2, rows or columns).

    Elements that are not finite on both sides are left out.
    """
    if base.is_complex():
        (b, i), (t, j) = (torch.view_as_real(side.to(torch.complex128)).unbind(-1) for side in (base, tuned))
        return squares(b, t, dim=dim) + squares(i, j, dim=dim)
    b, t = values(base), values(tuned)
    d = t - b
    found = torch.stack([(x * x).sum(1 - dim, dtype=torch.float64) for x in (d, b)])
    if not torch.isfinite(found).all():
        finite = torch.isfinite(b) & torch.isfinite(t)
        careful = [torch.where(finite, x.double(), 0.0) for x in (d, b)]
        found = torch.stack([(x * x).sum(1 - dim) for x in careful])
    return found.numpy()


def measure(sides: Any, sums: Any) -> None:
    """Add the sums of (base, tuned) to `sums`."""
    base, tuned = map(_values, sides)
    _gather(sums, measure_tensors(base, tuned))


def still(base: Any, sums: Any) -> None:
    """Add the sums of two sides known to be equal, of which one is read."""
    b = _values(base)
    _gather(sums, measure_tensors(b, b))


def beside(sides: Any, sums: Any) -> None:
    """Add the sums of BESIDE for (base, tuned, control)."""
    base, tuned, control = map(_values, sides)
    found = measure_tensors(base, tuned, control=control).control
    assert found is not None
    largest = max(sums[ControlField.LARGEST], found[ControlField.LARGEST])
    sums += found
    sums[ControlField.LARGEST] = largest


def _gather(sums: Any, found: Sums) -> None:
    if found.nonfinite:
        sums[:] = np.nan  # as the compiled engine does
        return
    largest = max(sums[Field.LARGEST], found.vector[Field.LARGEST])
    sums += found.vector
    sums[Field.LARGEST] = largest


def _values(words: Any) -> Tensor:
    return torch.from_numpy(words.view(np.int16)).view(_KINDS[words.dtype.name])
