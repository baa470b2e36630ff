"""Roles, tested by what the parameters do: right claims are confirmed and wrong ones refuted."""

import html
from dataclasses import replace

import pytest
import torch
from torch import nn

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.memory import from_module
from affectlens.errors import AffectlensError, RoleRefuted
from affectlens.probes.claims import Verification
from affectlens.probes.verifying import verify
from affectlens.sites import Cut, Site
from tests.tiny_models import MODEL_TYPES, tiny

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Fused, stacked, transposed, interleaved, per head, shared, latent and plain: one of each kind of layout.
LAYOUTS = {
    "llama": (*MLP, *ATTENTION),
    "qwen3": (*MLP, *ATTENTION),
    "gemma3_text": (*MLP, *ATTENTION),
    "gemma4_text": (*MLP, *ATTENTION),
    "phi3": (*MLP, *ATTENTION),
    "glm4": (*MLP, *ATTENTION),
    "gpt2": ("fc1", "fc2", *ATTENTION),
    "gpt_neox": ("fc1", "fc2", *ATTENTION),
    "bloom": ("fc1", "fc2", *ATTENTION),
    "falcon": ("fc1", "fc2", *ATTENTION),
    "mpt": ("fc1", "fc2", *ATTENTION),
    "gpt_bigcode": ("fc1", "fc2", *ATTENTION),
    "codegen": ("fc1", "fc2", *ATTENTION),
    "mixtral": (*MLP, *ATTENTION),
    "qwen2_moe": (*MLP, *ATTENTION),
    "gpt_oss": (*MLP, *ATTENTION),
    "llama4_text": (*MLP, *ATTENTION),
    "granitemoe": (*MLP, *ATTENTION),
    "jetmoe": MLP,
    "deepseek_v3": MLP,
    "qwen3_next": (*MLP, *ATTENTION),
    "bitnet": (*MLP, *ATTENTION),
    "bert": ("fc1", "fc2", *ATTENTION),
    "modernbert": (*MLP, *ATTENTION),
    "t5": ("fc1", "fc2", *ATTENTION),
    "mt5": (*MLP, *ATTENTION),
    "whisper": ("fc1", "fc2", *ATTENTION),
    "llava": (*MLP, *ATTENTION),
    "qwen2_vl": (*MLP, *ATTENTION),
    "qwen2_5_vl": (*MLP, *ATTENTION),
    "qwen3_vl": (*MLP, *ATTENTION),
    "gemma3": (*MLP, *ATTENTION),
    "aya_vision": (*MLP, *ATTENTION),
    "mllama": (*MLP, *ATTENTION),
    "qwen2_audio": (*MLP, *ATTENTION),
    "qwen2_5_omni_thinker": (*MLP, *ATTENTION),
    "phi4_multimodal": (*MLP, *ATTENTION),
    "moonshine": ATTENTION,
}


def verified(model: nn.Module) -> Verification:
    return verify(model, from_module(model))


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_what_the_names_say_holds(model_type: str) -> None:
    """No claim is refuted, and those on the language model's matrices are confirmed."""
    found = verified(tiny(model_type))
    language = [claim for claim in found.claims if claim.tower == "language"]
    confirmed = {role for claim in language if claim.verdict == "confirmed" for role in claim.roles}

    assert () == found.check().refuted
    assert set(LAYOUTS[model_type]) <= confirmed
    open_ = {role for claim in language if claim.verdict == "unverified" for role in claim.roles}
    assert set() == open_ & set(LAYOUTS[model_type])


def test_vision_and_audio_towers_are_reached() -> None:
    """Towers that take pictures or sound get made-up ones."""
    found = verified(tiny("qwen2_5_omni_thinker"))

    assert {"language", "vision", "audio"} <= {claim.tower for claim in found.confirmed}


def test_enough_architectures_are_built() -> None:
    """The zoo has at least 100 types, each once."""
    assert 100 <= len(set(MODEL_TYPES)) == len(MODEL_TYPES)
    assert set(LAYOUTS) <= set(MODEL_TYPES)


def exchanged(checkpoint: Checkpoint, one: str, other: str) -> list[str]:
    """Exchange the tensors of two roles of the language model; return their names."""
    sites = {role: [s for s in language(checkpoint) if s.role == role] for role in (one, other)}
    tensors = []
    for site in sites[one]:
        twin = next(s for s in sites[other] if replace(s, role=one) == site)
        storage = checkpoint.storage
        storage[site], storage[twin] = storage[twin], storage[site]
        tensors += [storage[site].tensor, storage[twin].tensor]
    return tensors


def language(checkpoint: Checkpoint) -> list[Site]:
    return [
        site
        for site, where in checkpoint.storage.items()
        if site.tower == "language" and site.layer is not None and len(where.shape) > 1
    ]


@pytest.mark.parametrize(
    ("model_type", "one", "other"),
    [
        (kind, *pair)
        for kind in ("llama", "qwen2_vl", "phi3", "gpt_oss", "mixtral", "qwen2_moe", "granitemoe", "bitnet")
        for pair in (("gate_proj", "up_proj"),)
    ]
    + [
        (kind, *pair)
        for kind in ("llama", "gpt2", "gpt_neox", "bert", "whisper")
        for pair in (("q_proj", "k_proj"), ("k_proj", "v_proj"), ("q_proj", "v_proj"))
        if (kind, pair[0]) != ("llama", "q_proj")  # under grouped queries they differ in shape
    ],
)
def test_exchanged_roles_are_refuted(model_type: str, one: str, other: str) -> None:
    """Gate and up, q and k, k and v are exchanged: every tensor concerned is refuted."""
    model = tiny(model_type)
    checkpoint = from_module(model)
    tensors = exchanged(checkpoint, one, other)

    found = verify(model, checkpoint)

    assert set(tensors) == {claim.tensor for claim in found.refuted}
    with pytest.raises(RoleRefuted, match=tensors[0].replace(".", r"\.")):
        found.check()


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "gpt_neox", "falcon"])
@pytest.mark.parametrize("by", [-8, 8])
def test_slices_off_by_half_a_head_are_refuted(model_type: str, by: int) -> None:
    """A fused tensor is cut half a head too early or too late."""
    model = tiny(model_type)
    checkpoint = from_module(model)
    for site in language(checkpoint):
        where = checkpoint.storage[site]
        if where.cut and site.role in ("q_proj", "k_proj") and site.param == "weight":
            cut = where.cut
            start = max(0, cut.start + by)
            checkpoint.storage[site] = where._replace(
                cut=Cut(cut.dim, start, start + cut.stop - cut.start, cut.period)
            )

    found = verify(model, checkpoint).refuted

    assert {"q_proj", "k_proj"} & {role for claim in found for role in claim.roles}
    assert {0, 1} == {claim.layer for claim in found}


@pytest.mark.parametrize("model_type", ["phi3", "mixtral"])
def test_a_concatenated_gate_is_not_interleaved(model_type: str) -> None:
    """Every second row is taken for the gate."""
    model = tiny(model_type)
    checkpoint = from_module(model)
    for site in language(checkpoint):
        where = checkpoint.storage[site]
        if where.cut and site.role in ("gate_proj", "up_proj"):
            first = int(site.role == "up_proj")
            checkpoint.storage[site] = where._replace(cut=Cut(where.cut.dim, first, first + 1, 2))

    assert {0, 1} == {claim.layer for claim in verify(model, checkpoint).refuted}


@pytest.mark.parametrize("model_type", ["bert", "gpt_neox"])
def test_a_plain_mlp_is_no_gated_one(model_type: str) -> None:
    """The first matrix of a plain MLP is claimed as gate and up."""
    model = tiny(model_type)
    checkpoint = from_module(model)
    for site in [s for s in language(checkpoint) if s.role == "fc1" and s.param == "weight"]:
        where = checkpoint.storage.pop(site)
        half = where.shape[0] // 2
        shape = (half, *where.shape[1:])
        for number, role in enumerate(("gate_proj", "up_proj")):
            cut = Cut(0, number * half, (number + 1) * half)
            checkpoint.storage[replace(site, role=role)] = where._replace(shape=shape, cut=cut)
    for site in [s for s in language(checkpoint) if s.role == "fc2" and s.param == "weight"]:
        checkpoint.storage[replace(site, role="down_proj")] = checkpoint.storage.pop(site)

    found = verify(model, checkpoint).refuted

    assert {0, 1} == {claim.layer for claim in found}
    assert "up_proj" in {role for claim in found for role in claim.roles}


def test_a_gate_is_no_plain_mlp() -> None:
    """A matrix that holds gate and up is claimed as the first of a plain MLP."""
    model = tiny("phi3")
    checkpoint = from_module(model)
    for site in language(checkpoint):
        where = checkpoint.storage[site]
        if site.role == "gate_proj":
            shape = (2 * where.shape[0], where.shape[1])
            checkpoint.storage[replace(site, role="fc1")] = where._replace(shape=shape, cut=None)
        if site.role == "down_proj":
            checkpoint.storage[replace(site, role="fc2")] = where
        if site.role in MLP:
            del checkpoint.storage[site]

    assert {("fc1",)} == {claim.roles for claim in verify(model, checkpoint).refuted}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Breaks(nn.Module):
    """A linear layer that raises at its nth call."""

    def __init__(self, linear: nn.Linear, at: int) -> None:
        super().__init__()
        self.weight, self.left = linear.weight, at

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("broken")
        return nn.functional.linear(states, self.weight)


@pytest.mark.parametrize("at", [None, 0, 1, 5])
def test_the_model_is_left_as_it_was(at: int | None) -> None:
    """It keeps every bit, its mode and the next random numbers, and gets no hook."""
    model = tiny("llama").train()
    if at is not None:
        model.model.layers[1].mlp.up_proj = Breaks(model.model.layers[1].mlp.up_proj, at)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    found = verified(model)

    assert expected == torch.rand(1)
    assert () == found.refuted
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())


def test_what_does_not_run_stays_unverified() -> None:
    """A model that can't run makes no crash and no verdict: its claims stay unverified, with a reason."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Breaks(layer.mlp.up_proj, 0)
        layer.self_attn.q_proj = Breaks(layer.self_attn.q_proj, 0)

    found = verified(model)

    assert (14, 0) == (len(found.unverified), len(found.refuted))
    assert all(claim.reason for claim in found.unverified)


def test_a_batch_is_used_as_given() -> None:
    """The user's input replaces the made-up ones."""
    model = tiny("llama")
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}

    found = verify(model, from_module(model), batch=batch)

    assert (14, 0, 0) == (len(found.confirmed), len(found.refuted), len(found.unverified))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_probed_in_float32(dtype: torch.dtype) -> None:
    """The float32 copy shows what rounding would hide."""
    model = tiny("qwen2_5_vl").to(dtype)

    found = verified(model)

    assert () == found.refuted
    assert {*MLP, *ATTENTION} <= {role for claim in found.confirmed for role in claim.roles}
    assert {dtype} == {p.dtype for p in model.parameters()}


def test_it_shows_itself() -> None:
    """The repr counts by tower and role and lists what is refuted; names are escaped."""
    model = tiny("llama")
    checkpoint = from_module(model)
    exchanged(checkpoint, "gate_proj", "up_proj")
    found = verify(model, checkpoint)
    strange = Verification(tuple(replace(claim, tensor="<b>\x1b") for claim in found.claims))

    assert repr(found).startswith("14 claims: 10 confirmed, 4 refuted, 0 unverified")
    assert "refuted: model.layers.0.mlp.up_proj.weight: " in repr(found)
    assert html.escape("<b>") in strange._repr_html_()
    assert "\x1b" not in repr(strange)
    assert issubclass(RoleRefuted, ValueError)
    assert issubclass(RoleRefuted, AffectlensError)
