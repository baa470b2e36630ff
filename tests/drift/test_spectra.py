"""Singular values of a change agree with a float64 SVD, or say that they have not converged."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from affectlens.drift import spectra
from affectlens.drift.spectra import TOLERANCE, factored_spectrum, spectrum

K = 8
WHOLE = np.arange(1, 1025)
# What the 1024 singular values of a 2048 × 1024 matrix may look like.
SHAPES = {
    "low rank": np.where(WHOLE <= 10, 11.0 - WHOLE, 0),
    "fewer than k": np.where(WHOLE <= 3, 4.0 - WHOLE, 0),
    "power law": 1 / WHOLE,
    "geometric": 0.97**WHOLE,
    "all equal": np.ones(1024),
    "a tie of twelve": np.where(WHOLE <= 12, 1.0, 0.99),
    "a spike in the bulk": np.where(WHOLE <= 1, 10.0, np.linspace(1, 0.5, 1024)),
    "tiny": 1e-25 / WHOLE,
}


def directions(rows: int, columns: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def example(rows: int, columns: int, values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Tensor:
    u, v = directions(rows, len(values), seed=0), directions(columns, len(values), seed=1)
    return ((u * torch.as_tensor(values, dtype=torch.float64)) @ v.T).float()


def noise(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def exact(delta: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.linalg.svd(delta.double().numpy(), compute_uv=False)


def effective(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    kept = values[values > math.sqrt(len(values) * 2.0**-52) * values[0]]
    parts = kept / kept.sum()
    return float(np.exp(-(parts * np.log(parts)).sum()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_iterated_equals_svd(shape: str, transposed: bool) -> None:
    """On a large matrix the top k, the norms and ranks are those of an SVD, whatever the spectrum."""
    delta = example(2048, 1024, SHAPES[shape])
    values = exact(delta)

    found = spectrum(delta.T if transposed else delta, K)

    assert found.converged
    assert found.residual <= TOLERANCE
    assert pytest.approx(values[:K], abs=2e-8 * values[0]) == found.values
    assert pytest.approx(values[0], rel=2e-8) == found.spectral_norm
    assert pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6) == found.stable_rank
    assert pytest.approx(effective(values), rel=1e-6) == found.effective_rank


@pytest.mark.parametrize("gram", [0, spectra.GRAM])
@pytest.mark.parametrize(("rows", "columns"), [(2048, 1024), (1024, 1024), (600, 3000)])
def test_noise_converges_or_says_so(
    rows: int, columns: int, gram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a flat spectrum the values are right within the residual, and `converged` is never too much."""
    monkeypatch.setattr(spectra, "GRAM", gram)
    delta = noise(rows, columns)
    values = exact(delta)

    found = spectrum(delta, K)

    assert np.abs(found.values - values[:K]).max() <= max(found.residual, 1e-12) * values[0]
    assert found.converged == (found.residual <= TOLERANCE)
    assert math.isnan(found.effective_rank) == (gram == 0)


def test_too_few_steps_have_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A basis too small for a flat spectrum gives wrong values, says so, and compares no directions."""
    monkeypatch.setattr(spectra, "GRAM", 0)
    monkeypatch.setattr(spectra, "_BASIS", 48)
    monkeypatch.setattr(spectra, "_DEPTH", 3)
    delta = noise(2048, 1024)
    error = np.abs(spectrum(delta, K).values / exact(delta)[:K] - 1).max()

    found = spectrum(delta, K, base=delta)

    assert error > 1e-2
    assert not found.converged
    assert found.residual > error
    assert all(map(math.isnan, found.overlap))


def test_what_did_not_converge_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to GRAM, an eigendecomposition stands in for a basis that was too small."""
    monkeypatch.setattr(spectra, "_BASIS", 48)
    monkeypatch.setattr(spectra, "_DEPTH", 3)
    delta = noise(1200, 600)

    found = spectrum(delta, K, base=delta)

    assert found.converged
    assert pytest.approx(exact(delta)[:K], rel=1e-12) == found.values
    assert pytest.approx((1.0, 1.0)) == found.overlap


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (3, 5), (1, 700), (300, 400), (200_000, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_small_and_narrow_equal_svd(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Small and very narrow matrices have all the values that they can have, at most k."""
    delta = noise(rows, columns).to(dtype)
    values = exact(delta)

    found = spectrum(delta, K)

    assert min(K, rows, columns) == len(found.values)
    assert pytest.approx(values[:K], rel=1e-12) == found.values
    assert pytest.approx((values**2).sum() / values[0] ** 2) == found.stable_rank
    assert pytest.approx(effective(values)) == found.effective_rank
    assert found.converged


def test_many_values() -> None:
    """A k that is a large part of the smaller side is served too."""
    delta = noise(700, 600)

    found = spectrum(delta, 200)

    assert pytest.approx(exact(delta)[:200], rel=1e-9) == found.values
    assert found.converged


def test_the_same_change_gives_the_same_spectrum() -> None:
    """Starts are seeded, and the caller's random state is left alone."""
    delta = noise(1300, 700)
    torch.manual_seed(7)
    expected = spectrum(delta, K)
    drawn = torch.rand(3)
    torch.manual_seed(7)

    found = spectrum(delta, K)

    assert expected.values.tolist() == found.values.tolist()
    assert (expected.residual, expected.effective_rank) == (found.residual, found.effective_rank)
    assert drawn.tolist() == torch.rand(3).tolist()


def test_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values do not depend on how many rows are converted at a time."""
    delta = example(1300, 700, 0.97 ** np.arange(700))
    expected = spectrum(delta, K)
    monkeypatch.setattr(spectra, "_BLOCK", 50_000)

    found = spectrum(delta, K)

    assert pytest.approx(expected.values, rel=1e-12) == found.values
    assert pytest.approx(expected.effective_rank, rel=1e-9) == found.effective_rank


@pytest.mark.parametrize(
    ("out", "rank", "inside"), [(1500, 16, 700), (700, 4, 1500), (40, 64, 30), (5, 1, 9)]
)
@pytest.mark.parametrize("scale", [2.0, -0.25])
def test_factored_equals_materialised(out: int, rank: int, inside: int, scale: float) -> None:
    """The spectrum from LoRA's factors is that of their product, zeros beyond the rank included."""
    b, a = noise(out, rank), noise(rank, inside) + 0.5
    delta = scale * b.double() @ a.double()
    base = delta + noise(out, inside)
    expected = spectrum(delta, K, base=base)

    found = factored_spectrum(b, a, k=K, scale=scale, base=base)

    assert pytest.approx(exact(delta)[:K], abs=1e-12 * expected.spectral_norm) == found.values
    assert found.converged
    assert found.residual < 1e-12
    for name in ("stable_rank", "effective_rank", "overlap", "expected"):
        assert pytest.approx(getattr(expected, name), rel=1e-7) == getattr(found, name), name


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (1500, 700)])
def test_identical_subspaces_overlap_wholly(rows: int, columns: int) -> None:
    """A change along the base's own leading directions has overlap 1, one across them has 0."""
    values = np.r_[np.linspace(3, 2, K), np.linspace(1, 0.1, 20)]
    base = example(rows, columns, values)
    along = example(rows, columns, np.r_[np.linspace(2, 3, K), np.zeros(20)])
    across = example(rows, columns, np.r_[np.zeros(20), np.linspace(3, 2, K)])

    found = spectrum(along, K, base=base)

    assert pytest.approx((1.0, 1.0), abs=1e-6) == found.overlap
    assert (K / rows, K / columns) == found.expected
    assert pytest.approx((0.0, 0.0), abs=1e-6) == spectrum(across, K, base=base).overlap


def test_a_rotated_plane() -> None:
    """By hand: the plane (e₁, e₂) against (e₁, cos t·e₂ + sin t·e₃) overlaps by (1 + cos² t)/2."""
    base, delta = torch.zeros(5, 4), torch.zeros(5, 4)
    base[0, 0], base[1, 1] = 4.0, 3.0
    delta[0, 1], delta[1, 3], delta[2, 3] = 5.0, 2 * math.cos(0.3), 2 * math.sin(0.3)

    found = spectrum(delta, 2, base=base)

    assert pytest.approx([5.0, 2.0]) == found.values.tolist()
    # On the right: e₂ is in the base's plane, e₄ is not.
    assert pytest.approx(((1 + math.cos(0.3) ** 2) / 2, 0.5)) == found.overlap
    assert (2 / 5, 2 / 4) == found.expected


def test_random_subspaces_overlap_as_expected() -> None:
    """Of unrelated directions the overlap is k/out and k/in."""
    spike = np.linspace(3, 2, 32)
    base = directions(1500, 32, seed=5) * torch.as_tensor(spike) @ directions(700, 32, seed=6).T

    found = spectrum(example(1500, 700, spike), 32, base=base)

    assert pytest.approx(found.expected, rel=0.15) == found.overlap


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (2048, 600)])
def test_no_change_at_all(rows: int, columns: int) -> None:
    """A zero change has zero values and no ranks or directions, from factors too."""
    delta, base = torch.zeros(rows, columns), noise(rows, columns)
    found = [
        spectrum(delta, 3, base=base),
        factored_spectrum(torch.zeros(rows, 2), noise(2, columns), k=3, base=base),
        factored_spectrum(noise(rows, 2), noise(2, columns), k=3, scale=0.0, base=base),
    ]

    for one in found:
        assert [0.0, 0.0, 0.0] == one.values.tolist()
        assert (0.0, True, 0.0) == (one.residual, one.converged, one.spectral_norm)
        assert all(map(math.isnan, (one.stable_rank, one.effective_rank, *one.overlap)))


def test_a_base_of_zeros_has_no_directions() -> None:
    """There is nothing to overlap with."""
    assert all(map(math.isnan, spectrum(noise(6, 4), 2, base=torch.zeros(6, 4)).overlap))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_is_refused(value: float) -> None:
    """NaN and infinity are an error that says what to do."""
    delta = noise(40, 30)
    delta[3, 4] = value

    for call in (
        lambda: spectrum(delta, 2),
        lambda: spectrum(noise(40, 30), 2, base=delta),
        lambda: factored_spectrum(delta, noise(30, 7), k=2),
    ):
        with pytest.raises(ValueError, match=r"shape \(40, 30\) has NaN or infinite.* Leave it out"):
            call()


def test_what_is_no_matrix_is_refused() -> None:
    """Vectors, empty matrices, k below 1 and a base of another shape are errors."""
    with pytest.raises(ValueError, match=r"k must be 1 or more singular values, got 0"):
        spectrum(noise(4, 3), 0)
    with pytest.raises(ValueError, match=r"got shape \(0, 3\)"):
        spectrum(noise(0, 3), 2)
    # With shapes checked, as in the tests, the annotation is first.
    with pytest.raises(
        (ValueError, TypeError), match=r"base has shape \(3, 4\), its change|parameter 'base'"
    ):
        spectrum(noise(4, 3), 2, base=noise(3, 4))
