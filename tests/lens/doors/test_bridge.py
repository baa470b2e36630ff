"""A bridge to TransformerLens computes what the lens computes, with the interventions that it was given."""

import copy
import sys
import types
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError, MissingExtra, NoSuchSite, Remark
from affectlens.interventions import Knockout, Mean, Patch, Resample, Scale, Steer, Transplant, Zero
from affectlens.lens.doors.bridge import bridge, bridge_input
from affectlens.sites import Point, Points, Site
from tests.lens.families import BY_NAME, base, logits, tuned
from tests.numbers import differ, rounding

# TransformerLens computes with the parts of fused matrices, so their sums are rounded in another order.
FUSED = ("phi3", "gpt2")
PARTS = rounding(1000)  # share of the largest logit: two layers and a head of some ten sums over 64 to 128
BITWISE = (
    "llama", "mixtral", "qwen2_moe", "llava", "llava_onevision", "gemma3", "idefics3", "smolvlm", "internvl",
    "qwen2_vl", "qwen2_audio", "qwen2_5_omni", "t5_gated", "t5gemma",
)  # fmt: skip
NEEDS_TORCHVISION = ("qwen2_5_vl", "qwen3_vl")
TURNING = ("qwen2_vl", "qwen2_5_omni")  # positions in three dimensions


@cache
def eager(name: str) -> al.Lens:
    """A lens whose model attends as a bridge's does."""
    model = copy.deepcopy(base(name))
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return al.Lens(model)


def bridged(built: Any, name: str) -> Tensor:
    """The logits of every position, through a bridge, media and all."""
    with torch.no_grad():
        found: Tensor = built(**bridge_input(built, BY_NAME[name].batch()))
    return found


def through_hooks(name: str, plan: Sequence[Any]) -> Tensor:
    with eager(name).intervene(*plan):
        return logits(eager(name).model, BY_NAME[name].batch())


def of(lens: al.Lens, role: str, **where: Any) -> al.Sites:
    return lens.sites.where(tower="language", role=role, param="weight", **where)


@pytest.mark.parametrize("name", [*BITWISE, *FUSED])
def test_a_bridge_computes_what_the_model_computes(name: str) -> None:
    """Logits with pictures and sounds are the model's own, to the bit unless matrices are fused."""
    expected, actual = through_hooks(name, ()), bridged(bridge(eager(name)), name)

    torch.testing.assert_close(actual, expected, atol=PARTS * float(expected.abs().max()), rtol=0)
    assert name in FUSED or torch.equal(expected, actual)


def test_another_attention_agrees_where_positions_are_real() -> None:
    """A lens that attends by sdpa has the logits of a bridge, which attends eagerly, up to rounding."""
    lens, batch = al.Lens(base("llava")), BY_NAME["llava"].batch()
    real = batch["attention_mask"].bool()
    expected, actual = logits(lens.model, batch)[real], bridged(bridge(lens), "llava")[real]

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def a_neuron(lens: al.Lens, kind: str) -> Points:
    role = "down_proj" if "down_proj" in {s.role for s in lens.sites} else "fc2"
    return Points(Point(site.at(neuron=3), kind) for site in of(lens, role))


KINDS: dict[str, Callable[[al.Lens, str], Sequence[Any]]] = {
    "transplant": lambda lens, name: [Transplant(of(lens, "o_proj"), donor=tuned(name))],
    "amplify": lambda lens, name: [Transplant(of(lens, "o_proj"), donor=tuned(name), alpha=2.0)],
    "zero a head": lambda lens, _: [Zero(Points(Point(s.at(head=1), "heads") for s in of(lens, "o_proj")))],
    "zero a neuron": lambda lens, _: [Zero(a_neuron(lens, "gated"))],
    "a neuron before its activation": lambda lens, _: [Scale(a_neuron(lens, "pre_activation"), factor=3.0)],
    "queries": lambda lens, _: [Scale(of(lens, "q_proj").at("output"), factor=2.0)],
    "a head's queries": lambda lens, _: [
        Zero(Points(Point(s.at(head=1), "output") for s in of(lens, "q_proj")))
    ],
    "what keys are made of": lambda lens, _: [Scale(of(lens, "k_proj").at("input"), factor=2.0)],
    "logits": lambda lens, _: [Scale(of(lens, "lm_head").at("output"), factor=2.0)],
    "norms": lambda lens, _: [Scale(of(lens, "norm").at("output"), factor=2.0)],
    "steer the last token": lambda lens, _: [
        Steer(of(lens, "o_proj", layer=0).at("residual", span="last"), vector=torch.linspace(-1, 1, 64))
    ],
    "mean over what is passed": lambda lens, name: [
        Mean(points := of(lens, "o_proj").at("heads"), over=lens.record(points, BY_NAME[name].batch()))
    ],
    "resample": lambda lens, name: [
        Resample(points := of(lens, "o_proj").at("heads"), over=lens.record(points, BY_NAME[name].batch()))
    ],
    "patch from a model beside": lambda lens, name: [
        Patch(of(lens, "o_proj", layer=0).at("residual"), source=al.Lens(tuned(name)))
    ],
    "knockout": lambda lens, _: [Knockout(of(lens, "o_proj"), source=(0, 1, 2), target="last")],
    "knockout of a head": lambda lens, _: [
        Knockout([site.at(head=1) for site in of(lens, "o_proj")], source=(0, 1, 2), target="last")
    ],
    "weights, then activations": lambda lens, _: [
        Scale(of(lens, "o_proj", layer=0), factor=0.5),
        Scale(of(lens, "o_proj").at("output"), factor=3.0),
        Zero(of(lens, "v_proj", layer=1)),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_plan_through_a_bridge_is_the_plan_through_hooks(name: str, kind: str) -> None:
    """Each kind of intervention does the same through both, and does something."""
    lens = eager(name)
    try:
        plan = KINDS[kind](lens, name)
    except NoSuchSite:
        assert (name, kind) == ("gpt2", "logits")  # they are tied to the embeddings
        return
    expected, actual = through_hooks(name, plan), bridged(bridge(lens, *plan), name)

    # Fused matrices are computed in parts there, so sums are rounded in another order.
    torch.testing.assert_close(actual, expected, atol=PARTS * float(expected.abs().max()), rtol=0)
    assert name in FUSED or torch.equal(expected, actual)
    assert not torch.allclose(expected, through_hooks(name, ()), atol=1e-4)


@pytest.mark.parametrize("name", BITWISE)
def test_a_plan_agrees_in_every_family(name: str) -> None:
    """Weights, heads, the residual stream of a medium, and what is cut from the last token: to the bit."""
    lens, media = eager(name), BY_NAME[name].media
    plan = [
        Transplant(of(lens, "v_proj"), donor=tuned(name)),
        Scale(of(lens, "o_proj").at("residual", span=media[0] if media else "prompt"), factor=2.0),
        Zero(Points(Point(s.at(head=1), "heads", "last") for s in of(lens, "o_proj"))),
    ]
    if not BY_NAME[name].decodes:
        plan.append(Knockout(of(lens, "o_proj"), source=media[0] if media else 0, target="last"))

    assert torch.equal(through_hooks(name, plan), bridged(bridge(lens, *plan), name))


SEEN = {
    "llava": ("vision", "projector"),
    "qwen2_vl": ("vision", "projector"),
    "qwen2_5_omni": ("audio", "vision"),
    "qwen2_audio": ("audio",),
}


@pytest.mark.parametrize(
    ("name", "tower"), [(name, tower) for name, towers in SEEN.items() for tower in towers]
)
def test_towers_that_see_and_hear_can_be_changed(name: str, tower: str) -> None:
    """Modules of towers have hooks too, whether TransformerLens wraps them or not."""
    lens = eager(name)
    sites = lens.sites.where(
        tower=tower, role="fc1" if tower != "vision" or name != "qwen2_5_omni" else "gate_proj"
    )
    plan = [Scale(sites.where(param="weight").at("output"), factor=3.0)]
    expected = through_hooks(name, plan)

    assert torch.equal(expected, bridged(bridge(lens, *plan), name))
    assert differ(expected, through_hooks(name, ()))


@pytest.mark.parametrize("name", ["llama", "phi3", "llava", "qwen2_vl", "qwen2_audio"])
def test_interventions_hold_in_each_step_of_an_answer(name: str) -> None:
    """`original_model.generate` on a bridge answers as the lens's model does within the block."""
    lens = eager(name)
    plan = [
        Scale(of(lens, "o_proj").at("residual", span="last"), factor=1.5),
        Scale(of(lens, "o_proj").at("heads", span="generated"), factor=-1.0),
    ]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = BY_NAME[name].batch()
    with lens.intervene(*plan):
        expected = lens.model.generate(**batch, **settings)  # type: ignore[operator]
    actual = bridge(lens, *plan).original_model.generate(**batch, **settings)  # type: ignore[operator]

    assert torch.equal(expected, actual)
    assert differ(expected, lens.model.generate(**batch, **settings))  # type: ignore[operator]


@pytest.mark.parametrize("name", TURNING)
def test_answers_that_would_be_wrong_are_refused(name: str) -> None:
    """A bridge's own `generate` counts positions in one dimension, so it is refused where there are three."""
    with pytest.raises(NotImplementedError, match="not supported"):
        bridge(eager(name)).generate(BY_NAME[name].batch()["input_ids"])


@pytest.mark.parametrize("name", NEEDS_TORCHVISION)
def test_what_an_adapter_needs_is_told(name: str) -> None:
    """Without torchvision nothing is booted, and nothing installed."""
    with pytest.raises(
        MissingExtra, match=r"needs torchvision.*affectlens installs nothing.*or use lens\.intervene"
    ):
        bridge(eager(name))


@pytest.mark.parametrize("name", NEEDS_TORCHVISION)
def test_with_what_it_needs_a_bridge_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision is there, these families are bridged to the bit, and don't answer wrongly."""
    there = types.ModuleType("torchvision")
    there.__spec__ = ModuleSpec("torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision", there)
    lens = eager(name)
    plan = [Scale(of(lens, "gate_proj").at("pre_activation", span="image"), factor=2.0)]
    built = bridge(lens, *plan)

    assert torch.equal(through_hooks(name, plan), bridged(built, name))
    with pytest.raises(NotImplementedError, match="not supported"):
        built.generate(BY_NAME[name].batch()["input_ids"])


def test_interventions_outlast_what_resets_hooks() -> None:
    """`run_with_cache`, `run_with_hooks` and `reset_hooks` leave them, and the cache shows what they made."""
    lens, name = eager("llama"), "blocks.0.attn.hook_z"
    built = bridge(lens, Zero(of(lens, "o_proj").at("heads")))
    expected = bridged(built, "llama")
    batch = bridge_input(built, BY_NAME["llama"].batch())
    _, cache = built.run_with_cache(**batch)
    built.run_with_hooks(batch.pop("input"), fwd_hooks=[(name, lambda tensor, hook: tensor + 1)], **batch)
    built.reset_hooks()

    assert 0 == cache[name].abs().max()
    assert torch.equal(expected, bridged(built, "llama"))


def test_each_intervention_sees_those_before_it() -> None:
    """A mean over examples is taken with what was changed before it in force, as it is in a block."""
    lens, batch = eager("llama"), BY_NAME["llama"].batch()
    points = of(lens, "o_proj").at("heads")

    class MeanOfItself:
        def rewrites(self, on: al.Lens) -> Any:
            return Mean(points, over=on.record(points, batch)).rewrites(on)

    plan = [Scale(of(lens, "v_proj", layer=0), factor=3.0), Scale(points, factor=2.0), MeanOfItself()]

    assert torch.equal(through_hooks("llama", plan), bridged(bridge(lens, *plan), "llama"))


def test_the_lens_is_left_as_it_was() -> None:
    """Parameters, buffers, configs, hooks and modules are the very same after a bridge was built and used."""
    lens = al.Lens(copy.deepcopy(base("llava")))
    before = fingerprint(lens.model)
    built = bridge(
        lens, Transplant(of(lens, "gate_proj"), donor=tuned("llava")), Zero(of(lens, "o_proj").at("heads"))
    )
    bridged(built, "llava")
    with torch.no_grad():
        for parameter in built.original_model.parameters():
            parameter.zero_()

    assert before == fingerprint(lens.model)


def fingerprint(model: nn.Module) -> list[object]:
    """All that could be told of a model, as values."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    found: list[object] = [
        (name, id(t), t.data_ptr(), t.double().sum().item(), t.requires_grad) for name, t in tensors
    ]
    found += [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
    found += [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return [*found, model.config.to_json_string(), model.config._attn_implementation]  # type: ignore[union-attr, operator]


def test_a_donor_is_left_as_it_was() -> None:
    """A bridge's weights are its own, also those that came from a model in memory."""
    lens, donor = eager("llama"), copy.deepcopy(tuned("llama"))
    before = fingerprint(donor)
    built = bridge(lens, Transplant(lens.sites, donor=donor))
    with torch.no_grad():
        for parameter in built.original_model.parameters():
            parameter.zero_()

    assert before == fingerprint(donor)


def test_nothing_is_drawn() -> None:
    """What is drawn next is the same with and without a bridge, also where parts of it have to be made."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    bridge(eager("gpt2"))

    assert torch.equal(expected, torch.rand(3))


def test_the_dtype_is_the_models_own_or_as_asked() -> None:
    """A bfloat16 model is bridged in bfloat16, or in float32 if asked: weights are cast, and no more."""
    model = copy.deepcopy(base("llava")).bfloat16()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    lens, batch = al.Lens(model), BY_NAME["llava"].batch()
    own, asked = bridge(lens), bridge(lens, dtype="float32")

    assert (torch.bfloat16, torch.float32) == (own.cfg.dtype, asked.cfg.dtype)
    assert torch.equal(logits(model, batch), bridged(own, "llava"))
    assert torch.equal(logits(copy.deepcopy(model).float(), batch), bridged(asked, "llava"))
    with pytest.raises(LensError, match="'float3' is not a torch dtype"):
        bridge(lens, dtype="float3")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_merged_into_the_copy() -> None:
    """A model with an adapter of PEFT is bridged with what it computes, and keeps its adapter."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["gate_proj", "q_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(eager("llama").model), config)
    lens = al.Lens(adapted)
    built = bridge(lens, Scale(of(lens, "gate_proj").at("output"), factor=2.0))
    with lens.intervene(Scale(of(lens, "gate_proj").at("output"), factor=2.0)):
        expected = logits(lens.model, BY_NAME["llama"].batch())

    torch.testing.assert_close(bridged(built, "llama"), expected, atol=1e-5, rtol=0)
    assert any("lora_A" in key for key, _ in lens.model.named_parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_off_is_left_out_of_the_copy() -> None:
    """Disabled in the model, or for the lens; switched off in some layers only, it is refused."""
    import peft

    plain = eager("llama").model
    config = peft.LoraConfig(target_modules=["gate_proj", "q_proj"], r=4, init_lora_weights=False)
    lens = al.Lens(peft.get_peft_model(copy.deepcopy(plain), config))
    expected = logits(plain, BY_NAME["llama"].batch())
    with lens.model.disable_adapter():  # type: ignore[operator]
        disabled = bridge(lens)
    for built in (disabled, bridge(lens.without_adapter())):
        torch.testing.assert_close(bridged(built, "llama"), expected, atol=1e-5, rtol=0)
    next(m for m in lens.model.modules() if hasattr(m, "set_scale")).enable_adapters(False)  # type: ignore[operator]
    with pytest.raises(LensError, match="some layers only"):
        bridge(lens)


def test_text_becomes_the_tokens_that_it_is_to_the_lens(lens: al.Lens, demo: al.Demo) -> None:
    """The tokenizer is a copy of the lens's, looked up nowhere; a batch of real examples gives its logits."""
    before = lens.tokenizer.padding_side, lens.tokenizer.bos_token, len(lens.tokenizer)
    built = bridge(lens)
    examples = demo.task("faces-unseen").examples[:3]
    real = built(**bridge_input(built, lens.prepare(*examples)))[:, -1]

    assert lens.tokenizer("so happy")["input_ids"] == built.to_tokens("so happy")[0].tolist()
    assert before == (lens.tokenizer.padding_side, lens.tokenizer.bos_token, len(lens.tokenizer))
    assert built.tokenizer is not lens.tokenizer
    assert built.processor is not lens.processor
    torch.testing.assert_close(real, lens.logits(*examples), atol=1e-4, rtol=0)


def test_logits_are_the_sum_of_what_components_contribute(lens: al.Lens, demo: al.Demo) -> None:
    """Direct logit attribution by the cache, pictures and all: the norm's scale frozen, its weight put in."""
    built = bridge(lens)
    with torch.no_grad():
        expected, cache = built.run_with_cache(
            **bridge_input(built, lens.prepare(*demo.task("faces-unseen").examples[:2]))
        )
        parts = cache.decompose_resid(mode="all")
        parts[0] = cache["blocks.0.hook_resid_pre"]  # by itself, it has the placeholder for a picture
        parts = cache.apply_ln_to_stack(parts, layer=-1)
        actual = (parts @ (built.ln_final.weight[:, None] * built.W_U)).sum(0)

    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_what_could_be_misread_is_told_once() -> None:
    """A bridge says what a block would say of the same intervention."""
    lens = al.Lens(copy.deepcopy(base("llama")))
    with pytest.warns(Remark, match="same logits"):
        bridge(lens, Zero(of(lens, "gate_proj")))

    bridge(lens, Zero(of(lens, "gate_proj")))


def test_what_is_collected_of_a_tower_is_what_was_made_of_it() -> None:
    """LLaVA takes a picture's features from a layer before the last, as transformers collects them."""
    model = BY_NAME["llava"].build()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    lens, batch = al.Lens(model), BY_NAME["llava"].batch()
    plan = [
        Scale(
            lens.sites.where(tower="vision", role="fc1", layer=0, param="weight").at("residual"), factor=3.0
        )
    ]
    with lens.intervene(*plan):
        expected = logits(model, batch)
    unchanged = logits(model, batch)
    with lens.intervene(*plan):
        again = logits(model, batch)

    assert torch.equal(expected, bridged(bridge(lens, *plan), "llava"))
    assert torch.equal(expected, again)
    assert not torch.allclose(expected, unchanged, atol=1e-4)


def test_a_point_that_nothing_passes_is_told_once() -> None:
    """A bridge that is shown no picture says after its first pass that its vision was not changed."""
    lens, batch = eager("llava"), BY_NAME["llama"].batch()
    built = bridge(
        lens, Scale(lens.sites.where(tower="vision", role="fc1", layer=0).at("output"), factor=2.0)
    )
    with pytest.warns(Remark, match=r"first pass of this bridge did not reach vision\.0\.fc1.*@output"):
        built(**bridge_input(built, batch))

    built(**bridge_input(built, batch))


def test_what_cannot_be_bridged_is_refused() -> None:
    """A family without an adapter; a model in use, compiled or not in memory; a place that no hook sees."""
    lens = eager("llama")
    hooked, compiled = copy.deepcopy(base("llama")), copy.deepcopy(base("llama"))
    compiled.compile()
    empty = copy.deepcopy(base("llama")).to("meta")

    with pytest.raises(LensError, match="has an adapter of WhisperForConditionalGeneration"):
        bridge(eager("whisper"))
    with (
        al.Lens(hooked).intervene(Scale(of(lens, "o_proj").at("output"), factor=2.0)),
        pytest.raises(LensError, match="has hooks, which a copy would share"),
    ):
        bridge(al.Lens(hooked))
    with pytest.raises(LensError, match="is compiled"):
        bridge(al.Lens(compiled))
    with pytest.raises(LensError, match="on the meta device"):
        bridge(al.Lens(empty))
    with pytest.raises(LensError, match="no hook sees a single expert"):
        bridge(eager("mixtral"), Zero(of(eager("mixtral"), "gate_proj").at("output")))
    with pytest.raises(NoSuchSite):
        bridge(lens, Zero(Points([Point(Site("language", "gate_proj", layer=99))])))
