"""The measures of one site equal those of whole tensors in float64."""

import math

import pytest
import torch
from torch import Tensor

from affectlens.checkpoints.slicing import same_bits
from affectlens.drift import torch_engine
from affectlens.drift.measures import columns
from affectlens.drift.torch_engine import BLOCK

SHAPES = [(3,), (7, 5), (1, BLOCK), (3, BLOCK + 1), (400, 500)]


def measure(base: Tensor, tuned: Tensor, *, control: Tensor | None = None) -> dict[str, float | int]:
    return columns(torch_engine.measure_tensors(base, tuned, control=control))


def example(shape: tuple[int, ...], dtype: torch.dtype, *, drift: float = 1e-3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    return base.to(dtype), (base + drift * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_equals_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every measure over blocks is that over the whole tensor in float64."""
    base, tuned = example(shape, dtype)
    b, t = base.float().double(), tuned.float().double()
    d = t - b

    found = measure(base, tuned)

    expected = {
        "frobenius": d.norm(),
        "base_norm": b.norm(),
        "relative": d.norm() / b.norm(),
        "rms": d.norm() / math.sqrt(d.numel()),
        "mean_abs": d.abs().mean(),
        "max_abs": d.abs().max(),
        "cosine": (b * t).sum() / (b.norm() * t.norm()),
    }
    for name, value in expected.items():
        assert pytest.approx(float(value), rel=1e-6, abs=1e-12) == found[name], name
    assert int((base != tuned).sum()) == found["changed"]
    assert int((b.sign() * t.sign() < 0).sum()) == found["sign_flips"]
    assert 0 == found["nonfinite"]


def test_identical_tensors_still_have_a_norm() -> None:
    """No drift, but the denominator of a role's ratio."""
    base, _ = example((300, 300), torch.bfloat16)

    found = measure(base, base.clone())

    assert (0.0, 0.0, 0) == (found["frobenius"], found["relative"], found["changed"])
    assert pytest.approx(float(base.double().norm()), rel=1e-9) == found["base_norm"]


def test_nonfinite_values_are_counted_and_left_out() -> None:
    """One NaN or infinity on either side does not spoil the rest."""
    base, tuned = example((64, 64), torch.float32)
    expected = measure(base.reshape(-1)[3:], tuned.reshape(-1)[3:])
    base[0, 0], tuned[0, 1], tuned[0, 2] = math.nan, math.inf, -math.inf

    found = measure(base, tuned)

    assert 3 == found["nonfinite"]
    assert {k: v for k, v in expected.items() if k != "nonfinite"} == pytest.approx(
        {k: v for k, v in found.items() if k != "nonfinite"}
    )


def test_known_answer() -> None:
    """By hand: base (3, 4), tuned (3, −4)."""
    found = measure(torch.tensor([3.0, 4.0]), torch.tensor([3.0, -4.0]))

    assert (8.0, 5.0, 1.6) == (found["frobenius"], found["base_norm"], found["relative"])
    assert pytest.approx(-7 / 25) == found["cosine"]
    assert (1, 1, 8.0, 4.0) == (found["changed"], found["sign_flips"], found["max_abs"], found["mean_abs"])


def test_the_control_is_measured_in_the_same_pass() -> None:
    """Its norms and its angle to the change stand beside."""
    base, tuned = example((50, 50), torch.float32)
    control = base + 2 * (tuned - base)

    found = measure(base, tuned, control=control)

    assert pytest.approx(2 * found["frobenius"], rel=1e-5) == found["control_frobenius"]
    assert pytest.approx(1.0, abs=1e-6) == found["control_cosine"]


def test_equality_is_of_bits() -> None:
    """NaN equals itself; 0.0 is not −0.0."""
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([0.0]).double())
