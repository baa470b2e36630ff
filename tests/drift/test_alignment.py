"""What a gated MLP may do without changing what it computes is found and undone, and nothing else is."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from affectlens.drift import alignment
from affectlens.drift.alignment import Mlp, align, aligned

SIZES = [(64, 32), (300, 96), (1500, 256)]  # neurons, hidden
# With how much noise, and how large the direction is that all neurons share.
RECOVERED = [(*size, noise, 0.0) for size in SIZES for noise in (0.02, 0.3, 1.0)]
RECOVERED += [(*size, noise, 1.0) for size in SIZES[1:] for noise in (0.02, 0.3)]
STRANGE = [(*size, common) for size in [*SIZES, (64, 16)] for common in (0.0, 1.0, 2.0)]
STRANGE += [(1, 8, 0.0), (3, 8, 0.0)]


def example(neurons: int, hidden: int, *, seed: int = 0, common: float = 0.0) -> Mlp:
    """Random weights, with a direction that all neurons share."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(3, hidden, generator=torch.Generator().manual_seed(99)) * common
    gate, up, down = (torch.randn(neurons, hidden, generator=generator) + row for row in shared)
    return Mlp(0.02 * gate, 0.02 * up, 0.02 * down.T.contiguous())


def noisy(mlp: Mlp, noise: float) -> Mlp:
    generator = torch.Generator().manual_seed(1)
    return Mlp(*(side + 0.02 * noise * torch.randn(side.shape, generator=generator) for side in mlp))


def scrambled(mlp: Mlp) -> tuple[Mlp, Tensor, Tensor]:
    """The same function: neuron i goes to the place of order⁻¹[i], its scale is divided out by `scales`."""
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(len(mlp.gate), generator=generator)
    scales = torch.exp(torch.randn(len(order), generator=generator) * 0.7)
    scales = torch.where(torch.rand(len(order), generator=generator) < 0.5, -scales, scales)
    up, down = mlp.up * scales[:, None], mlp.down / scales
    return Mlp(mlp.gate[order], up[order], down[:, order]), torch.argsort(order), scales


def drift(one: Mlp, two: Mlp) -> float:
    return math.sqrt(
        sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in zip(one, two, strict=True))
    )


def computed(mlp: Mlp, x: Tensor) -> Tensor:
    gate, up, down = (side.double() for side in mlp)
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize(("neurons", "hidden", "noise", "common"), RECOVERED)
def test_permutation_and_scales_are_recovered(neurons: int, hidden: int, noise: float, common: float) -> None:
    """Neurons permuted and rescaled by either sign come back, and what is left is the noise."""
    base = example(neurons, hidden, common=common)
    tuned = noisy(base, noise)
    moved, permutation, scales = scrambled(tuned)

    found = align(base, moved)

    assert permutation.tolist() == found.permutation.tolist()
    assert (torch.sign(scales) > 0).tolist() == (found.scales > 0).tolist()
    assert found.confident
    assert not found.greedy
    assert pytest.approx(drift(base, tuned), rel=0.01) == drift(base, aligned(moved, found))
    assert drift(base, moved) > 1.2 * drift(base, tuned)
    if noise == 0.02:
        assert pytest.approx(1 / scales.numpy(), rel=0.02) == found.scales


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize(("neurons", "hidden"), SIZES)
def test_an_ordinary_fine_tune_stays_as_it_is(neurons: int, hidden: int, noise: float) -> None:
    """Noise alone moves no neuron, and the drift stays what it was."""
    base = example(neurons, hidden)
    tuned = noisy(base, noise)

    found = align(base, tuned)

    assert (0, True) == (found.moved, found.confident)
    assert list(range(neurons)) == found.permutation.tolist()
    assert pytest.approx(drift(base, tuned), rel=0.01, abs=1e-6) == drift(base, aligned(tuned, found))
    if noise <= 0.02:
        assert 0 == found.rescaled


def test_no_change_is_no_alignment() -> None:
    """A model aligned with itself is itself, bit for bit and in its own dtype."""
    base = Mlp(*(side.bfloat16() for side in example(64, 32)))

    found = align(base, base)

    assert np.ones(64).tolist() == found.scales.tolist()
    for one, two in zip(base, aligned(base, found), strict=True):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype


def test_a_layout_in_memory_is_no_change() -> None:
    """The same weights laid out by columns are summed in the same order: every scale is exactly 1."""
    base = example(300, 96)

    found = align(base, Mlp(*(side.T.contiguous().T for side in base)))

    assert np.ones(300).tolist() == found.scales.tolist()


def test_the_function_stays_the_same() -> None:
    """An aligned MLP computes what it computed before."""
    base = example(300, 96)
    tuned, _, _ = scrambled(noisy(base, 0.3))
    x = torch.randn(20, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    found = align(base, tuned)

    assert found.moved > 290
    assert found.rescaled > 250
    expected = computed(tuned, x)
    assert torch.allclose(expected, computed(aligned(tuned, found), x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("neurons", "hidden", "common"), STRANGE)
def test_strangers_are_left_alone(neurons: int, hidden: int, common: float) -> None:
    """Unrelated weights are not aligned, even where all their neurons share a direction."""
    base, tuned = (example(neurons, hidden, seed=seed, common=common) for seed in (0, 1))

    found = align(base, tuned)

    assert (0, 0, False) == (found.moved, found.rescaled, found.confident)
    assert common or neurons < 64 or found.confidence < 0.2


def test_a_few_counterparts_make_no_alignment() -> None:
    """Strangers with thirty neurons in common, as two layers of one model may be, stay as they are."""
    base, tuned = example(300, 96), example(300, 96, seed=1)
    for one, two in zip(tuned, base, strict=True):
        side, other = (one.T, two.T) if one is tuned.down else (one, two)
        side[100:130] = other[:30]

    found = align(base, tuned)

    assert (0, 0, False) == (found.moved, found.rescaled, found.confident)


def test_only_the_neurons_that_moved_are_moved() -> None:
    """Two neurons that changed places are found among neurons that stayed, with one that was trained anew."""
    base = example(64, 32)
    tuned = noisy(base, 0.1)
    order = torch.arange(64)
    order[[3, 40]] = order[[40, 3]]
    tuned = Mlp(tuned.gate[order], tuned.up[order], tuned.down[:, order])
    other = example(64, 32, seed=5)
    tuned.gate[7], tuned.up[7], tuned.down[:, 7] = other.gate[7], other.up[7], other.down[:, 7]

    found = align(base, tuned)

    assert order.tolist() == found.permutation.tolist()
    assert 2 == found.moved
    assert 1.0 == found.scales[7]


def test_by_hand() -> None:
    """Two neurons that changed places, the first with up × −2 and down ÷ −2."""
    axes = torch.eye(64)
    base = Mlp(axes[:2], axes[2:4], axes[4:6].T)
    tuned = Mlp(
        axes[[1, 0]], axes[[3, 2]] * torch.tensor([[1.0], [-2.0]]), axes[[5, 4]].T / torch.tensor([1, -2])
    )

    found = align(base, tuned)

    assert [1, 0] == found.permutation.tolist()
    assert [-0.5, 1.0] == found.scales.tolist()
    assert (2, 1, 1.0) == (found.moved, found.rescaled, found.confidence)
    assert 0.0 == drift(base, aligned(tuned, found))


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf])
def test_neurons_without_a_direction_are_left_alone(broken: float) -> None:
    """Neurons that are zero, NaN or infinite on either side crash nothing and keep their scale."""
    base = example(64, 32)
    tuned, permutation, _ = scrambled(noisy(base, 0.1))
    dead = [0, 1, 2]
    base.up[dead], base.down[:, dead], base.gate[0] = broken, broken, broken
    places = permutation[[*dead, 9]]
    tuned.up[places], tuned.down[:, places], tuned.gate[places[0]] = broken, broken, broken

    found = align(base, tuned)

    assert sorted(found.permutation) == list(range(64))
    alive = [i for i in range(64) if i not in (*dead, 9)]
    assert permutation[alive].tolist() == found.permutation[alive].tolist()
    assert np.isfinite(found.scales).all()
    assert [1.0, 1.0, 1.0] == found.scales[dead].tolist()


def test_all_zero() -> None:
    """MLPs of nothing but zeros stay as they are."""
    empty = Mlp(torch.zeros(20, 8), torch.zeros(20, 8), torch.zeros(8, 20))

    found = align(empty, empty)

    assert (0, 0, 0.0, False) == (found.moved, found.rescaled, found.confidence, found.confident)


def test_beyond_the_cap_only_nearest_pairs_are_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too many neurons left for an assignment they are matched greedily, and the result says so."""
    monkeypatch.setattr(alignment, "SOLVED", 100)
    base = example(300, 96)
    tuned, permutation, _ = scrambled(noisy(base, 1.0))

    found = align(base, tuned)

    assert found.greedy
    assert sorted(found.permutation) == list(range(300))
    assert (permutation.numpy() == found.permutation).mean() > 0.95


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alignment does not depend on how many neurons are compared at a time."""
    base = example(300, 96)
    tuned, _, _ = scrambled(noisy(base, 1.0))
    expected = align(base, tuned)
    monkeypatch.setattr(alignment, "_BLOCK", 77)

    found = align(base, tuned)

    assert expected.permutation.tolist() == found.permutation.tolist()
    assert pytest.approx(expected.scales) == found.scales


def test_sixteen_bits_are_rescaled_in_thirty_two() -> None:
    """Rounding to 16 bits would pass for drift."""
    base = Mlp(*(side.bfloat16() for side in example(64, 32)))
    tuned = Mlp(base.gate, base.up * 2, base.down / 2)

    found = aligned(tuned, align(base, tuned))

    assert [torch.bfloat16, torch.float32, torch.float32] == [side.dtype for side in found]
    assert pytest.approx(0, abs=1e-6) == drift(base, found)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """MLPs of different shapes, or with down the wrong way round, are an error that shows the shapes."""
    base = example(64, 32)
    with pytest.raises(ValueError, match=r"different shapes: .*\(64, 32\).* in base and .*\(60, 32\)"):
        align(base, example(60, 32))

    turned = base._replace(down=base.down.T)
    with pytest.raises(ValueError, match=r"down \(hidden, neurons\), got .* Are they fused or transposed"):
        align(turned, turned)
