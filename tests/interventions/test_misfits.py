"""What can't be put in at a point is told before anything runs."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import transformers

import affectlens as al
from affectlens.errors import LensError
from tests.lens.families import BY_NAME, FEW, base


@cache
def small() -> al.Lens:
    """A model with half the width of the others and half of their vocabulary."""
    return llama(hidden_size=32, vocab_size=128)


def llama(**changes: int) -> al.Lens:
    config = BY_NAME["llama"].build().config
    assert isinstance(config, transformers.PretrainedConfig)
    for name, value in changes.items():
        setattr(config, name, value)
    config.head_dim = 16
    torch.manual_seed(0)
    return al.Lens(transformers.LlamaForCausalLM(config).eval())


def point(lens: al.Lens, kind: str = "residual", **which: object) -> al.Points:
    return lens.sites.where(tower="language", role="down_proj", layer=0, **which).at(kind, span="last")


def recorded(keep: str = "values") -> object:
    return small().record(point(small()), {"input_ids": torch.arange(1, 8)[None]}, keep=keep)


MISFITS: dict[str, Callable[[al.Lens], object]] = {
    "a recording": lambda lens: al.Patch(point(lens), source=recorded()),  # type: ignore[arg-type]
    "a lens": lambda lens: al.Patch(point(lens), source=small()),
    "a mean": lambda lens: al.Mean(point(lens), over=recorded("mean")),  # type: ignore[arg-type]
    "draws": lambda lens: al.Resample(point(lens), over=recorded()),  # type: ignore[arg-type]
    "a vector": lambda lens: al.Steer(point(lens), vector=[1.0] * 32),
}


@pytest.mark.parametrize("what", MISFITS)
def test_another_width_is_told_when_the_block_is_entered(what: str) -> None:
    """The error names both widths; no pass is needed."""
    lens = al.Lens(base("llama"))
    with pytest.raises(LensError, match=r"64 features pass there, but .* has 32"):
        lens.intervene(MISFITS[what](lens)).__enter__()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["output", "input", "gated", "pre_activation", "residual"])
@pytest.mark.parametrize("family", FEW)
def test_the_width_is_that_of_what_passes(family: str, kind: str) -> None:
    """A vector of that width is taken, and one entry more is refused, in every family and at every point."""
    lens, batch = al.Lens(base(family)), BY_NAME[family].batch()
    places = lens.sites.where(tower="language", role=lambda role: role in ("down_proj", "fc2"), layer=0).at(
        kind
    )
    try:
        width = lens.record(places[:1], batch)[places[0]].values.shape[-1]  # type: ignore[union-attr]
    except (LensError, IndexError):
        pytest.skip("this family has no such point")
    with lens.intervene(al.Steer(places[:1], vector=torch.zeros(width))):
        lens.run(batch)
    with (
        pytest.raises(LensError, match=f"{width} features pass"),
        lens.intervene(al.Steer(places[:1], vector=torch.zeros(width + 1))),
    ):
        lens.run(batch)


def test_a_model_with_fewer_tokens_or_layers_can_not_be_patched_from() -> None:
    """It would be run on tokens that it does not have, or asked for a layer that it lacks."""
    lens, fewer, shorter = (llama(**change) for change in ({}, {"vocab_size": 128}, {"num_hidden_layers": 1}))
    last = lens.sites.where(role="down_proj").at("residual")[-1:]

    with pytest.raises(LensError, match="knows 128 tokens, and this one 256"):
        lens.intervene(al.Patch(last, source=fewer)).__enter__()
    with pytest.raises(LensError, match="has no such site; its layers may be fewer"):
        lens.intervene(al.Patch(last, source=shorter)).__enter__()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    """NaN or infinity in a vector, a mean or draws."""
    lens = al.Lens(base("llama"))
    with pytest.raises(LensError, match="holds NaN or infinity"):
        al.Steer(point(lens), vector=[value] * 64)
    recording = lens.record(point(lens), BY_NAME["llama"].batch())
    found = recording[recording.points[0]]
    found.values[0, 0, 0] = value  # type: ignore[union-attr]
    with pytest.raises(LensError, match="holds NaN or infinity"):
        lens.intervene(al.Resample(point(lens), over=recording)).__enter__()


@pytest.mark.parametrize(
    ("dtype", "alpha", "limit"),
    [
        (torch.float16, 1e3, "float16, 65,504"),
        (torch.bfloat16, 1e3, ""),  # the same sum has room
        (torch.bfloat16, 1e37, "bfloat16, 3.3895e+38"),
        (torch.float32, 1e37, "float32, 3.4028e+38"),
    ],
)
def test_a_sum_beyond_the_dtype_is_told(dtype: torch.dtype, alpha: float, limit: str) -> None:
    """The error names the largest number of the dtype."""
    lens = al.Lens(BY_NAME["llama"].build().to(dtype))
    steer = al.Steer(point(lens), vector=torch.full((64,), 100.0), alpha=alpha)
    told = pytest.raises(LensError, match=re.escape(f"the largest number of {limit}"))
    with told if limit else nullcontext(), lens.intervene(steer):
        assert lens.run(BY_NAME["llama"].batch()).isfinite().all()


def test_a_unit_has_no_residual_of_its_own() -> None:
    """A change there would act on all of them."""
    lens = al.Lens(base("llama"))
    head = lens.sites.where(role="o_proj", layer=0)[0].at(head=1)
    neuron = lens.sites.where(role="down_proj", layer=0)[0].at(neuron=3)

    for unit in (head, neuron):
        with pytest.raises(LensError, match="has no residual of its own"):
            lens.record(al.Sites([unit]).at("residual"), BY_NAME["llama"].batch())
