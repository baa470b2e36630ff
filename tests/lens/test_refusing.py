"""Compiled, offloaded, spread and quantised models work, or are refused before anything changes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import CompileConfig

import affectlens as al
from affectlens.errors import LensError
from affectlens.lens import Recording
from tests.lens.families import BY_NAME, base, logits, tuned
from tests.lens.hooks.test_hook_restoring import hooks
from tests.lens.test_lens import same, snapshot
from tests.lens.test_restoring import state
from tests.numbers import differ

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the compiler, about itself
    pytest.mark.filterwarnings("ignore:.*backend ignoring extra kwargs"),
    # Torch's compiler, of this one release of Python: it slows its guards and changes no result.
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]
FAMILY = "qwen2_5_vl"


def gates(lens: al.Lens) -> al.Sites:
    return lens.sites.where(tower="language", role="gate_proj")


def activations(lens: al.Lens) -> dict[str, Callable[[], object]]:
    """Return blocks that install hooks in a model."""
    points = gates(lens).at("gated")
    return {
        "zero": lambda: lens.intervene(al.Zero(points)),
        "scale": lambda: lens.intervene(al.Scale(points, factor=2.0)),
        "both": lambda: lens.intervene(al.Transplant(gates(lens), donor=tuned("llama")), al.Zero(points)),
        "record": lambda: Recording(lens, points),
    }


def refused(lens: al.Lens, block: Callable[[], object], *, match: str) -> None:
    """Check that a block raises on entering, and leaves everything as it was."""
    before, about = snapshot(lens.model), state(lens.model)
    with pytest.raises(LensError, match=match), block():  # type: ignore[attr-defined]
        pytest.fail("the block was entered")

    assert same(before, snapshot(lens.model))
    assert about == state(lens.model)


# ---------------------------------------------------------------- compiled


@pytest.fixture(autouse=True)
def _forgetting() -> Iterator[None]:
    """Reset the compiler after each test."""
    yield
    torch._dynamo.reset()


def wrapped(model: nn.Module) -> nn.Module:
    found: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return found


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def layer_by_layer(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.compile(backend="eager")  # type: ignore[union-attr]
    return model


def by_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


COMPILED = (wrapped, in_place, layer_by_layer, by_forward)


@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_model_sees_swapped_weights(way: Callable[[nn.Module], nn.Module]) -> None:
    """A compiled graph reads the weights that the parameters point to: the donor's inside, its own after."""
    model, batch = way(BY_NAME["llama"].build()), BY_NAME["llama"].batch()
    lens, expected = al.Lens(model), logits(model, batch)
    assert torch.allclose(logits(base("llama"), batch), expected, rtol=0, atol=1e-5)
    for _ in range(2):
        with lens.intervene(al.Transplant(lens.sites, donor=tuned("llama"))):
            assert torch.allclose(logits(tuned("llama"), batch), logits(model, batch), rtol=0, atol=1e-5)
        assert torch.equal(expected, logits(model, batch))


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("way", COMPILED)
def test_hooks_in_a_compiled_model_are_refused(way: Callable[[nn.Module], nn.Module], ran: bool) -> None:
    """Hooks in a compiled model are an error: its graph would silently skip them."""
    model, batch = way(BY_NAME["llama"].build()), BY_NAME["llama"].batch()
    if ran:
        logits(model, batch)
    lens = al.Lens(model)
    for block in activations(lens).values():
        refused(lens, block, match="compiled")


def test_a_step_that_generate_compiled_is_not_run_by_mistake() -> None:
    """A step that `generate` compiled for a static cache is an error: it would skip hooks."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    settings = {"do_sample": False, "max_new_tokens": 5, "cache_implementation": "static",
                "compile_config": config}  # fmt: skip
    model.generate(**batch, **settings)  # type: ignore[operator]
    assert model._compiled_call is not None
    lens = al.Lens(model)
    refused(lens, activations(lens)["zero"], match="compiled.*disable_compile")


# ---------------------------------------------------------------- offloaded, spread


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    found: nn.Module = disk_offload(model, folder, execution_device=torch.device("cpu"))
    return found


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    found: nn.Module = cpu_offload(model, execution_device=torch.device("cpu"))
    return found


def in_part(model: nn.Module, folder: Path) -> nn.Module:
    places = {"model.visual": "cpu", "lm_head": "disk", "model.language_model.layers.1": "disk"}
    names = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places |= {f"model.language_model.{name}": "cpu" for name in names}
    found: nn.Module = dispatch_model(model, places, main_device="cpu", offload_dir=folder)
    return found


@pytest.mark.parametrize("way", [on_disk, on_cpu, in_part])
def test_an_offloaded_model_is_refused_untouched(
    way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    """An intervention with an offloaded site is an error before anything changes, also among other sites."""
    model, batch = way(BY_NAME[FAMILY].build(), tmp_path), BY_NAME[FAMILY].batch()
    expected, hooked = logits(model, batch), hooks(model)
    lens = al.Lens(model)
    assert lens.sites == al.Lens(base(FAMILY)).sites
    last = lens.sites.where(tower="language", layer=1, role="gate_proj")
    for changes in (
        (al.Zero(last),),
        (al.Transplant(lens.sites, donor=tuned(FAMILY)),),
        (al.Scale(gates(lens).at("gated"), factor=2.0), al.Zero(last)),
    ):
        with pytest.raises(LensError, match="offloaded"), lens.intervene(*changes):
            pytest.fail("the block was entered")

    assert hooked == hooks(model)
    assert torch.equal(expected, logits(model, batch))


@pytest.mark.parametrize("way", [on_disk, on_cpu, in_part])
def test_hooks_in_an_offloaded_model_work(
    way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    """Activations can be changed and recorded wherever the weights are stored."""
    model, batch = way(BY_NAME[FAMILY].build(), tmp_path), BY_NAME[FAMILY].batch()
    before, hooked = logits(model, batch), hooks(model)
    points = gates(al.Lens(model)).at("gated")
    seen = [al.Lens(one).record(points, batch) for one in (base(FAMILY), model)]
    with al.Lens(base(FAMILY)).intervene(al.Zero(points)):
        expected = logits(base(FAMILY), batch)
    with al.Lens(model).intervene(al.Zero(points)):
        assert torch.equal(expected, logits(model, batch))

    assert all(torch.equal(seen[0][point].values, seen[1][point].values) for point in points)  # type: ignore[union-attr]
    assert hooked == hooks(model)
    assert torch.equal(before, logits(model, batch))


def test_what_is_in_memory_of_an_offloaded_model_swaps(tmp_path: Path) -> None:
    """Layers that are in memory can be swapped as in a model without offloading."""
    model, batch = in_part(BY_NAME[FAMILY].build(), tmp_path), BY_NAME[FAMILY].batch()
    before = logits(model, batch)
    first = al.Lens(model).sites.where(tower="language", layer=0)
    change = al.Transplant(first, donor=tuned(FAMILY))
    with al.Lens(base(FAMILY)).intervene(change):
        expected = logits(base(FAMILY), batch)
    with al.Lens(model).intervene(change):
        assert torch.equal(expected, logits(model, batch))

    assert torch.equal(before, logits(model, batch))


def test_a_model_that_accelerate_spreads_works() -> None:
    """Interventions work beside accelerate's hooks, and leave them in place."""
    model, batch = BY_NAME[FAMILY].build(), BY_NAME[FAMILY].batch()
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    lens, before, about = al.Lens(model), snapshot(model), state(model)
    with lens.intervene(al.Transplant(lens.sites, donor=tuned(FAMILY))):
        assert torch.equal(logits(tuned(FAMILY), batch), logits(model, batch))
        with lens.intervene(al.Zero(gates(lens).at("gated"))):
            found = logits(model, batch)
    whole = tuned(FAMILY)
    with al.Lens(whole).intervene(al.Zero(gates(lens).at("gated"))):
        assert torch.equal(logits(whole, batch), found)

    assert same(before, snapshot(model))
    assert about == state(model)


# ---------------------------------------------------------------- quantised


class Packed(nn.Module):
    """A matrix of integers or 8-bit floats, with a scale."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        scale = linear.weight.abs().amax() / (400.0 if dtype.is_floating_point else 127.0)
        values = linear.weight.detach() / scale
        values = values + 128 if dtype == torch.uint8 else values
        whole = values.round() if not dtype.is_floating_point else values
        self.weight = nn.Parameter(whole.to(dtype), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.weight.float() - (128 if self.weight.dtype == torch.uint8 else 0)
        return nn.functional.linear(x, (values * self.weight_scale_inv).to(x.dtype))


QUANTISED = (torch.int8, torch.uint8, torch.float8_e4m3fn)


def quantised(dtype: torch.dtype) -> nn.Module:
    model = BY_NAME["llama"].build()
    for layer in model.model.layers:  # type: ignore[union-attr]
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name), dtype))  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_packed_weights_are_no_weights_to_swap(dtype: torch.dtype) -> None:
    """A swap of quantised weights is an error, also among other sites."""
    model = quantised(dtype)
    lens = al.Lens(model)
    for sites in (
        gates(lens),
        gates(lens)[:1] | lens.sites.where(role="q_proj"),
        lens.sites.where(role="q_proj") | gates(lens),
    ):
        refused(
            lens, lambda s=sites: lens.intervene(al.Transplant(s, donor=tuned("llama"))), match="quantised|8"
        )


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_around_packed_weights_everything_works(dtype: torch.dtype) -> None:
    """Other sites can be swapped, and the activations of quantised ones can be changed."""
    model, batch = quantised(dtype), BY_NAME["llama"].batch()
    lens, before = al.Lens(model), snapshot(model)
    plain = logits(model, batch)
    assert torch.allclose(logits(base("llama"), batch), plain, rtol=0, atol=0.3)
    with lens.intervene(al.Zero(lens.sites.where(role="o_proj"))):
        assert differ(plain, logits(model, batch))
    with lens.intervene(al.Zero(gates(lens).at("gated"))):
        found = logits(model, batch)
    other = base("llama")
    with al.Lens(other).intervene(al.Zero(gates(al.Lens(other)).at("gated"))):
        assert torch.equal(logits(other, batch), found)

    assert same(before, snapshot(model))


class Elsewhere(torch.Tensor):
    """A tensor subclass whose values another library stores."""


def test_a_tensor_of_another_librarys_is_refused() -> None:
    """A parameter of a tensor subclass is refused: setting `data` would not change its values."""
    model = BY_NAME["llama"].build()
    linear = model.model.layers[0].mlp.gate_proj  # type: ignore[index, union-attr]
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Elsewhere), requires_grad=False)
    lens = al.Lens(model)
    assert type(linear.weight.data) is Elsewhere
    refused(lens, lambda: lens.intervene(al.Transplant(gates(lens), donor=tuned("llama"))), match="Elsewhere")
