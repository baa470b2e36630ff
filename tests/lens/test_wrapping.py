"""A model that PEFT wraps: its sites are what it computes with, and swap and come back like any other's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import affectlens as al
from affectlens.errors import LensError
from tests.lens.families import BY_NAME, base, logits, tuned
from tests.lens.test_families import changed
from tests.lens.test_lens import same, snapshot
from tests.numbers import differ
from tests.small_models import nudge

# PEFT asks a model of transformers for a flag by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# What LoRA is put on; phi3's and gpt2's are fused, gpt2's are stored the other way round.
TARGETS = {
    "llama": r".*(q_proj|v_proj|gate_proj|down_proj)",
    "phi3": r".*(qkv_proj|gate_up_proj)",
    "gpt2": r".*(c_attn|c_fc)",
    "qwen2_moe": r".*(k_proj|shared_expert.up_proj)",
    "qwen2_5_vl": r".*(gate_proj|attn.qkv)",
    "gemma3": r".*(o_proj|up_proj)",
    "qwen2_5_omni": r".*(gate_proj|fc1|k_proj)",
    "whisper": r".*(q_proj|fc2)",
    "t5_gated": r".*(wi_0|q)",
}
NAMES = tuple(TARGETS)
DTYPES = (torch.float32, torch.bfloat16)


def adapted(name: str, dtype: torch.dtype = torch.float32, **more: object) -> nn.Module:
    """A family with a random adapter, which changes what it says."""
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[name], "init_lora_weights": False,
                "fan_in_fan_out": name == "gpt2", **more}  # fmt: skip
    found: nn.Module = get_peft_model(BY_NAME[name].build().to(dtype), LoraConfig(**settings)).eval()  # type: ignore[arg-type]
    return found


def merged(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    found: nn.Module = adapted(name, dtype).merge_and_unload().eval()  # type: ignore[operator]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_of_the_base_in_an_adapted_model_is_the_base(name: str, dtype: torch.dtype) -> None:
    """With the weights of another model everywhere, the adapter does nothing; after it, all of it is back."""
    model, batch = adapted(name, dtype), BY_NAME[name].batch()
    lens, before, expected = al.Lens(model), snapshot(model), logits(model, batch)
    assert differ(expected, logits(base(name, dtype), batch))
    for donor in (base(name, dtype), tuned(name, dtype)):
        with lens.intervene(al.Transplant(lens.sites, donor=donor)):
            assert torch.equal(logits(donor, batch), logits(model, batch))

    assert same(before, snapshot(model))
    assert torch.equal(expected, logits(model, batch))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapted_model_has_the_sites_of_its_base(name: str) -> None:
    """The adapter's factors are no sites of their own."""
    assert al.Lens(base(name)).sites == al.Lens(adapted(name)).sites


def donors(name: str, dtype: torch.dtype, where: Path) -> dict[str, Callable[[], object]]:
    """An adapter as it may be named: live, as PEFT saves it, or merged."""

    def saved() -> Path:
        adapted(name, dtype).save_pretrained(where)  # type: ignore[operator]
        return where

    return {"live": lambda: adapted(name, dtype), "folder": saved}


@pytest.mark.parametrize("kind", ["live", "folder"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_as_donor_is_the_merged_model(name: str, kind: str, tmp_path: Path) -> None:
    """Transplanted everywhere, the adapter gives the logits of PEFT's own merge."""
    model, batch = base(name), BY_NAME[name].batch()
    donor = donors(name, torch.float32, tmp_path)[kind]()
    found = changed(model, batch, al.Transplant(al.Lens(model).sites, donor=donor))  # type: ignore[arg-type]

    assert torch.allclose(logits(merged(name), batch), found, rtol=0, atol=2e-5)
    assert not torch.allclose(logits(model, batch), found, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_an_adapter_is_merged_in_the_dtype_of_the_base(name: str, tmp_path: Path) -> None:
    """In bfloat16 each value is what float32 gives, rounded once: within one rounding of PEFT's own merge."""
    model = base(name, torch.bfloat16)
    donor = donors(name, torch.bfloat16, tmp_path)["folder"]()
    lens, whole = al.Lens(model), al.Lens(merged(name, torch.bfloat16))
    with lens.intervene(al.Transplant(lens.sites, donor=donor)):  # type: ignore[arg-type]
        for site in lens.sites:
            ours, theirs = lens.parameter(site).float(), whole.parameter(site).float()
            # Peft rounds the product before it is added.
            assert torch.allclose(ours, theirs, rtol=2**-7, atol=2**-8), site
    assert torch.bfloat16 == next(model.parameters()).dtype


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "whisper"])
def test_one_adapted_site_is_changed_alone(name: str) -> None:
    """A fused part, or one layer, of an adapted model goes; the adapter goes on working everywhere else."""
    model, batch = adapted(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    site = next(site for site in lens.sites if site in lens.checkpoint.factors)
    with lens.intervene(al.Transplant(site, donor=base(name))):
        found = logits(model, batch)
        kept = {one: lens.parameter(one).clone() for one in lens.sites}
    whole = merged(name)
    expected = changed(whole, batch, al.Transplant(site, donor=base(name)))

    assert torch.allclose(expected, found, rtol=0, atol=2e-5)
    assert torch.equal(al.Lens(base(name)).parameter(site), kept[site])
    for other in lens.sites - [site]:
        assert torch.allclose(lens.parameter(other), kept[other], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_zeroing_an_adapted_site_zeroes_its_factors_too(name: str) -> None:
    """What is zeroed is what the module computes with, not the base under the adapter."""
    model, batch = adapted(name), BY_NAME[name].batch()
    lens, whole = al.Lens(model), merged(name)
    sites = al.Sites(lens.checkpoint.factors)

    assert torch.equal(changed(whole, batch, al.Zero(sites)), changed(model, batch, al.Zero(sites)))
    with lens.intervene(al.Scale(sites, factor=0.5)):
        scaled = logits(model, batch)
    assert torch.allclose(changed(whole, batch, al.Scale(sites, factor=0.5)), scaled, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_passes_an_adapted_module_is_what_it_computes_with_its_adapter(name: str) -> None:
    """Recorded around the adapter, as a merged model has it; put back it is nothing, and zeroed it goes."""
    model, whole, batch = adapted(name), merged(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    sites = al.Sites(s for s in lens.checkpoint.factors if s.tower == "language" and s.param == "weight")
    for kind in ("output", "input"):
        where = sites.at(kind)
        recorded, expected = (al.Lens(one).record(where, batch) for one in (model, whole))
        for point in where:
            one, other = (found[point].values for found in (recorded, expected))  # type: ignore[union-attr]
            assert torch.allclose(other, one, rtol=0, atol=1e-4), point
        assert torch.equal(logits(model, batch), changed(model, batch, al.Patch(where, source=recorded)))
    zeroed = [changed(one, batch, al.Zero(sites.at("output"))) for one in (model, whole)]

    assert torch.allclose(zeroed[1], zeroed[0], rtol=0, atol=1e-4)
    assert differ(logits(model, batch), zeroed[0])


def test_dora_is_refused_untouched() -> None:
    """DoRA rescales the rows of whatever is put there: said, and nothing is touched."""
    model, batch = adapted("llama", use_dora=True), BY_NAME["llama"].batch()
    lens, before, expected = al.Lens(model), snapshot(model), logits(model, batch)
    with (
        pytest.raises(LensError, match=r"DoRA.*merge"),
        lens.intervene(al.Transplant(lens.sites, donor=base("llama"))),
    ):
        pytest.fail("the block was entered")

    assert same(before, snapshot(model))
    assert torch.equal(expected, logits(model, batch))


def test_a_module_saved_whole_swaps_too() -> None:
    """PEFT's copy of a module that was trained whole is what computes, and what is swapped."""
    model, batch = adapted("llama", modules_to_save=["lm_head"]), BY_NAME["llama"].batch()
    nudge(model, "modules_to_save", scale=0.05)
    lens, before = al.Lens(model), snapshot(model)
    head = lens.sites.where(role="lm_head")
    with lens.intervene(al.Zero(head)):
        assert not logits(model, batch).any()
    with lens.intervene(al.Transplant(lens.sites, donor=tuned("llama"))):
        assert torch.equal(logits(tuned("llama"), batch), logits(model, batch))

    assert same(before, snapshot(model))


def test_generation_with_an_adapter_follows_the_swap() -> None:
    """Token by token it is the base that speaks inside the block."""
    model, batch = adapted("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    settings = {"do_sample": False, "max_new_tokens": 6}
    expected = base("llama").generate(**batch, **settings)  # type: ignore[operator]
    before = model.generate(**batch, **settings)  # type: ignore[operator]
    with lens.intervene(al.Transplant(lens.sites, donor=base("llama"))):
        assert torch.equal(expected, model.generate(**batch, **settings))  # type: ignore[operator]

    assert torch.equal(before, model.generate(**batch, **settings))  # type: ignore[operator]
    assert differ(before, expected)
