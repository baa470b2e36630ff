"""The pattern for PEFT matches exactly the modules of a selection."""

import re

import pytest

import affectlens as al
from affectlens.checkpoints.memory import from_module
from affectlens.errors import NoSuchSite
from affectlens.sites import locate
from tests.small_models import tiny

CHOICES = (
    {"role": "gate_proj", "tower": "language"},
    {"role": "gate_proj", "tower": "vision"},
    {"role": "mlp", "layer": [1]},
    {"role": ["q_proj", "o_proj"], "tower": "language", "layer": 0},
    {"role": "embed_tokens"},
)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_pattern_matches_exactly_the_selected_modules(choice: dict[str, object]) -> None:
    """The vision tower of Qwen2.5-VL has gates too, which a bare `gate_proj` would match."""
    model = tiny("qwen2_5_vl")
    sites = from_module(model).sites.where(**choice)  # type: ignore[arg-type]

    pattern = sites.to_target_modules()

    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    assert {site.parameter.rpartition(".")[0] for site in sites} == matched


def test_peft_adapts_what_was_selected() -> None:
    """PEFT adapts exactly the selected modules."""
    peft = pytest.importorskip("peft")
    model = tiny("qwen2_5_vl")
    gates = from_module(model).sites.where(role="gate_proj", tower="language")

    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=gates.to_target_modules()), model)

    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {site.parameter.removesuffix(".weight") for site in gates} == adapted


def test_half_of_a_fused_matrix_is_refused() -> None:
    """An adapter on `qkv` changes q, k and v, so a selection of q alone is an error."""
    sites = from_module(tiny("qwen2_5_vl")).sites.where(tower="vision", role="q_proj")

    with pytest.raises(
        NoSuchSite, match=r"attn.qkv.bias' also holds vision.0.k_proj.bias, which is not selected"
    ):
        sites.to_target_modules()


def test_nothing_and_parts_are_refused() -> None:
    """An empty pattern would mean PEFT's defaults, and a head is not a module."""
    sites = from_module(tiny("llama")).sites
    head = sites.where(role="q_proj", layer=0)[0].at(head=1)

    with pytest.raises(NoSuchSite, match="no site is selected"):
        (sites.where(role="q_proj") & sites.where(role="k_proj")).to_target_modules()
    with pytest.raises(
        NoSuchSite,
        match=r"q_proj\[head 1\] is a part of a matrix, .* whole modules. Select language.0.q_proj$",
    ):
        al.Sites([head], within=sites).to_target_modules()


def test_experts_that_the_live_model_stacks_are_refused() -> None:
    """A file has one `w1` for each expert; the model has no such modules."""
    names = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": (4, 4)
        for e in (0, 1)
        for w in ("w1", "w2", "w3")
    }

    with pytest.raises(NoSuchSite, match=r"gate_up_proj' is a bare parameter"):
        al.Sites(locate(names, config={"model_type": "mixtral"})).where(
            role=["gate_proj", "up_proj"]
        ).to_target_modules()


def test_bare_parameters_are_refused() -> None:
    """Stacked experts are parameters, not modules."""
    names = {
        f"model.layers.0.mlp.experts.{n}": s
        for n, s in (("gate_up_proj", (2, 8, 4)), ("down_proj", (2, 4, 4)))
    }

    with pytest.raises(NoSuchSite, match="give it to PEFT's target_parameters"):
        al.Sites(locate(names)).to_target_modules()
