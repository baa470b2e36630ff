"""Compute the singular values of a change: its largest directions, and over how many it spreads.

The top k come from block Lanczos, which only multiplies with Δ, and are returned with the residual they
reached: the flat spectrum of noise converges slowly, and a result that has not converged must show it. A
randomised SVD without a residual can be 10 % wrong without a sign of it. All sums are in float64, with Δ
converted a block of rows at a time. Changes given by factors (LoRA) are never multiplied out.
`affectlens.diff(..., spectra=k)` calls this site by site.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-5  # of the residual over σ1; the error of a value is about its square over the gap
SMALL = 512  # the smaller side up to which a plain SVD is taken, unless the larger is very large
GRAM = 4096  # the smaller side up to which all singular values are computed
_BLOCK = 1 << 20  # elements of Δ in float64 at a time: 8 MiB, half the time of 32 MiB
_SPARE = 8  # columns beyond k: convergence depends on the gap from the k-th value to the one after these
_BASIS = 512  # columns of the Krylov basis, or _DEPTH blocks where k is large
_DEPTH = 12


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The leading singular triplets σ, u, v of a change Δ, with the ranks and overlaps that follow.

    `values` are the top k, descending. `residual` is the largest ‖Δv − σu‖ or ‖Δᵀu − σv‖ over σ1, and
    `converged` is true if it is within 1e-5, for values and directions alike. `stable_rank` is
    ‖Δ‖_F²/σ1²; `effective_rank` is exp of the entropy of σ/Σσ (Roy & Vetterli, EUSIPCO 2007), without
    values below √(n·2⁻⁵²)·σ1, n the smaller side; NaN where n > 4096.

    `overlap` holds ‖U_Δᵀ U_W‖_F²/k, and the same for V, of the top k left and right directions of Δ and
    of its base (Hu et al., LoRA, 2021, section 7.3); NaN without a base, and where either's did not
    converge or is zero. `expected` is that of random subspaces, k/out and k/in. Where Δ has only r < k
    directions, those r are compared with the base's k. The ranks of a zero Δ are NaN.
    """

    values: "np.ndarray[Any, np.dtype[np.float64]]"
    residual: float
    converged: bool
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    overlap: tuple[float, float] = (math.nan, math.nan)
    expected: tuple[float, float] = (math.nan, math.nan)


class _Triplets(NamedTuple):
    left: Tensor  # (out, k)
    values: Tensor  # (k,)
    right: Tensor  # (in, k)
    residual: float
    all: Tensor | None = None  # every singular value, descending, where they are known


def spectrum(
    delta: Float[Tensor, "out in"],
    k: int,
    *,
    base: Float[Tensor, "out in"] | None = None,
    everything: bool = True,
) -> Spectrum:
    """Compute the top k singular values of a change, its ranks, and its overlap with its base.

    `everything=False` leaves out the slowest part, the effective rank of a large matrix.

    Raises ValueError for k < 1, for anything but a matrix, and for NaN or infinite values.
    Block Golub-Kahan-Lanczos with full reorthogonalisation: Golub, Luk & Overton, ACM TOMS 7 (1981);
    Musco & Musco, NeurIPS 2015. Seeded: the same Δ gives the same result.

    >>> found = spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), 1)
    >>> found.values, found.stable_rank
    (array([4.]), 1.5625)
    """
    square = _checked(delta, k)
    triplets = _triplets(delta, k, everything=everything)
    return _spectrum(triplets, square, k=k, shape=(delta.shape[0], delta.shape[1]), base=base)


def factored_spectrum(
    b: Float[Tensor, "out rank"],
    a: Float[Tensor, "rank in"],
    *,
    k: int,
    scale: float = 1.0,
    base: Float[Tensor, "out in"] | None = None,
) -> Spectrum:
    """Compute the spectrum of scale·B@A exactly from its factors, without multiplying them out.

    With B = Q₁R₁ and Aᵀ = Q₂R₂ the singular values are those of the rank × rank matrix scale·R₁R₂ᵀ.
    `values` beyond the rank are zero. Raises ValueError as `spectrum` does.

    >>> factored_spectrum(torch.tensor([[3.0], [4.0]]), torch.ones(1, 4), k=2, scale=0.5).values
    array([5., 0.])
    """
    _checked(b, k)
    _checked(a, k)
    b, a = _double(b), _double(a)
    (q1, r1), (q2, r2) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    inner = scale * (r1 @ r2.T)
    p, values, rt = torch.linalg.svd(inner, full_matrices=False)
    left, right = (q1 @ p)[:, :k], (q2 @ rt.T)[:, :k]
    forth, back = scale * (b @ (a @ right)), scale * (a.T @ (b.T @ left))
    residual = _residual(_Triplets(left, values[:k], right, 0.0), forth, back)
    missing = min(b.shape[0], a.shape[1]) - len(values)
    values = torch.cat([values, values.new_zeros(max(missing, 0))])
    triplets = _Triplets(left, values[:k], right, residual, values)
    return _spectrum(triplets, float((inner**2).sum()), k=k, shape=(len(b), a.shape[1]), base=base)


def _checked(matrix: Tensor, k: int) -> float:
    """Return ‖Δ‖_F²; raises ValueError where there is no spectrum."""
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"a spectrum needs a matrix with elements, got shape {tuple(matrix.shape)}.")
    if k < 1:
        raise ValueError(f"k must be 1 or more singular values, got {k}.")
    square = sum(float((block**2).sum()) for _, block in _blocks(matrix))
    if not math.isfinite(square):
        raise ValueError(
            f"can't compute singular values: a matrix of shape {tuple(matrix.shape)} has NaN or infinite "
            "values. Leave it out, or replace them first."
        )
    return square


def _spectrum(
    triplets: _Triplets, square: float, *, k: int, shape: tuple[int, int], base: Tensor | None
) -> Spectrum:
    first = float(triplets.values[0])
    converged = triplets.residual <= TOLERANCE
    overlap = expected = (math.nan, math.nan)
    if base is not None:
        if tuple(base.shape) != shape:
            raise ValueError(
                f"base has shape {tuple(base.shape)}, but its change has {shape}. Give the matching pair."
            )
        _checked(base, k)
        width = min(k, *shape)
        expected = width / shape[0], width / shape[1]
        if converged and first:
            overlap = _overlap(triplets, _triplets(base, k, everything=False))
    return Spectrum(
        values=triplets.values.cpu().numpy().astype(np.float64),
        residual=triplets.residual,
        converged=converged,
        spectral_norm=first,
        stable_rank=square / first**2 if first else math.nan,
        effective_rank=math.nan if triplets.all is None else _effective_rank(triplets.all, min(shape)),
        overlap=overlap,
        expected=expected,
    )


def _effective_rank(values: Tensor, n: int) -> float:
    # Smaller values are noise in a Gram matrix in float64. A floor for float32 would cut most of a flat tail.
    kept = values[values > math.sqrt(n * torch.finfo(torch.float64).eps) * values[0]]
    if not len(kept):
        return math.nan
    parts = kept / kept.sum()
    return math.exp(-float((parts * parts.log()).sum()))


def _overlap(change: _Triplets, base: _Triplets) -> tuple[float, float]:
    if base.residual > TOLERANCE or not base.values[0]:
        return math.nan, math.nan
    # Directions with σ below the tolerance are arbitrary ones of the null space.
    own = change.values[: change.left.shape[1]] > TOLERANCE * change.values[0]
    old = base.values > TOLERANCE * base.values[0]
    left = change.left[:, own].T @ base.left[:, old].to(change.left.device)
    right = change.right[:, own].T @ base.right[:, old].to(change.right.device)
    count = int(own.sum())
    return float((left**2).sum()) / count, float((right**2).sum()) / count


def _triplets(matrix: Tensor, k: int, *, everything: bool) -> _Triplets:
    """Compute the top k triplets, and every singular value where asked for and feasible."""
    if matrix.shape[0] < matrix.shape[1]:
        found = _triplets(matrix.T, k, everything=everything)
        return found._replace(left=found.right, right=found.left)
    side = matrix.shape[1]
    if side <= SMALL and matrix.numel() <= 4 * _BLOCK:
        left, values, right = torch.linalg.svd(_double(matrix), full_matrices=False)
        return _verified(matrix, left[:, :k], values[:k], right=right[:k].T)._replace(all=values)
    found = _krylov(matrix, k)
    if side > GRAM or not (everything or found.residual > TOLERANCE):
        return found
    gram = sum(block.T @ block for _, block in _blocks(matrix))
    assert isinstance(gram, Tensor)
    if found.residual <= TOLERANCE:
        squares = torch.linalg.eigvalsh(gram).flip(0)
    else:
        # Slow but complete: for a flat spectrum that the Krylov space could not resolve.
        squares, vectors = torch.linalg.eigh(gram)
        squares, right = squares.flip(0), vectors.flip(1)[:, :k]
        left, values, rt = torch.linalg.svd(_times(matrix, right), full_matrices=False)
        found = _verified(matrix, left, values, right=right @ rt.T)
    return found._replace(all=squares.clamp(min=0).sqrt())


def _krylov(matrix: Tensor, k: int) -> _Triplets:
    """Run block Lanczos on a tall matrix: Δ V = U B, and B's triplets approximate Δ's within V.

    A block is wider than k, so that it can find even k equal singular values.
    """
    side = matrix.shape[1]
    width = min(k + _SPARE, side)
    most = min(side, max(_BASIS, _DEPTH * width))
    start = torch.randn(side, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = torch.linalg.qr(start.to(_home(matrix)))[0]
    u, v = (block.new_empty(most, size).T for size in matrix.shape)
    b = block.new_zeros(most, most)
    at = 0
    for step in range(1, most + 1):
        end = at + block.shape[1]
        v[:, at:end] = block
        u[:, at:end], b[:end, at:end] = _extended(u[:, :at], _times(matrix, block))
        new, along = _extended(v[:, :end], _transposed_times(matrix, u[:, at:end]))
        if step % 4 == 0 or end == most:
            p, values, rt = torch.linalg.svd(b[:end, :end])
            rest = (along[end:] @ p[at:end, :k]).norm(dim=0).max()
            if end == most or float(rest) <= TOLERANCE / 10 * float(values[0]):
                break
        block, at = new[:, : most - end], end
    return _verified(matrix, u[:, :end] @ p[:, :k], values[:k], right=v[:, :end] @ rt[:k].T)


def _extended(basis: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal `new` that extends the basis, and c with block = [basis, new] @ c."""
    along = basis.T @ block
    new, rest = torch.linalg.qr(block - basis @ along)
    # Twice: the rest of a block that was nearly in the basis is mostly rounding.
    again = basis.T @ new
    new, correction = torch.linalg.qr(new - basis @ again)
    return new, torch.cat([along + again @ rest, correction @ rest])


def _verified(matrix: Tensor, left: Tensor, values: Tensor, *, right: Tensor) -> _Triplets:
    found = _Triplets(left, values, right, 0.0)
    residual = _residual(found, _times(matrix, right), _transposed_times(matrix, left))
    return found._replace(residual=residual)


def _residual(found: _Triplets, forth: Tensor, back: Tensor) -> float:
    """Return the largest ‖Δv − σu‖ or ‖Δᵀu − σv‖ over σ1, from Δ V and Δᵀ U."""
    one = forth - found.left * found.values
    two = back - found.right * found.values
    largest = max(float(one.norm(dim=0).max()), float(two.norm(dim=0).max()))
    return largest / float(found.values[0]) if found.values[0] else largest


def _times(matrix: Tensor, right: Tensor) -> Tensor:
    # Allocate once: pieces kept between blocks fragment the heap by 300 MB.
    product = right.new_empty(matrix.shape[0], right.shape[1])
    for rows, block in _blocks(matrix):
        product[rows] = block @ right
    return product


def _transposed_times(matrix: Tensor, left: Tensor) -> Tensor:
    product = left.new_zeros(left.shape[1], matrix.shape[1])
    for rows, block in _blocks(matrix):
        product += left[rows].T @ block  # three times as fast as block.T @ left
    return product.T


def _blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _BLOCK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        yield rows, _double(matrix[rows])


def _home(matrix: Tensor) -> torch.device:
    # MPS has no float64.
    return torch.device("cpu") if matrix.device.type == "mps" else matrix.device


def _double(matrix: Tensor) -> Tensor:
    return matrix.detach().to(_home(matrix)).double()
