"""What has to come out equal: adapters and merges, spellings of names, parts and wholes, splits."""

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import affectlens as al
from affectlens.checkpoints.memory import from_module
from affectlens.checkpoints.slicing import put
from affectlens.drift import blocks, parts, torch_engine
from affectlens.sites import Site
from tests.checkpoints.adapters.test_adapter import adapted
from tests.numbers import LANES, differ
from tests.small_models import nudge, tiny
from tests.tiny_models import tiny as tiny_of

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # PEFT has much to say

FOLDERS = tempfile.TemporaryDirectory()  # gone with the process
KINDS = ("lora", "rslora", "dora", "fused", "turned")
SPECTRA = ("spectral_norm", "stable_rank", "effective_rank", "overlap_out", "overlap_in")
CONTROLS = (
    "control_frobenius", "control_relative", "control_rms", "control_cosine", "control_along",
    "control_residual",
)  # fmt: skip
SUMMED = ("frobenius", "base_norm", "relative", "rms", *CONTROLS)

# how a trainer spells a language model's names: what it puts before them, inside them and behind
SPELLINGS: dict[str, Callable[[str], str]] = {
    "distributed": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled and distributed": lambda name: f"_orig_mod.module.{name}",
    "MiniGPT": lambda name: f"llama_model.{name}",
    "Omni thinker": lambda name: f"thinker.{name}",
    "a wrapped adapter's base": lambda name: f"base_model.model.{name}",
    "beside its factors": lambda name: (
        name.replace(".weight", ".base_layer.weight") if "_proj" in name else name
    ),
    "sharded": lambda name: name.replace("mlp.", "mlp._fsdp_wrapped_module."),
    "checkpointed": lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."),
}

WHERE = ["parameter", "role", "size", "dtype", "nonfinite", "targeted"]

# model type → how to see the queries, keys and values that its forward makes
ATTENTIONS = {
    "phi3": "interface",
    "gpt2": "interface",
    "gpt_neox": "interface",
    "gpt_bigcode": "interface",
    "bloom": "_reshape",
    "falcon": "_split_heads",
    "codegen": "_attn",
}
MIXTURES = ("mixtral", "qwen3_moe", "granitemoe", "olmoe")


def by_site(drift: al.Drift) -> pd.DataFrame:
    """The rows of a drift by what they speak of."""
    return drift.frame.set_index(["parameter", "role"]).sort_index()


def changed(value: Tensor) -> Tensor:
    """The same, a little more or less: of either sign, since a layer norm leaves a sum of zero."""
    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return value + 0.1 * signs


@functools.cache
def made(kind: str) -> tuple[nn.Module, Path, nn.Module]:
    """A base, the folder of an adapter over it, and the two merged."""
    base, model = adapted(kind)
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    model.save_pretrained(folder)
    return base, folder, model.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("unit", "roles"), [("head", ("q_proj", "k_proj", "v_proj", "o_proj")),
                                             ("neuron", ("gate_proj", "up_proj", "down_proj"))])  # fmt: skip
def test_heads_and_neurons_of_an_adapter_are_those_of_its_merge(
    kind: str, unit: str, roles: tuple[str, ...]
) -> None:
    """From factors, from exact blocks or from the merged model, each unit has the same norms."""
    base, adapter, merged = made(kind)
    expected = by_site(al.diff(base, merged, detail=f"{unit}s", progress=False))
    expected = expected[expected.index.get_level_values("role").isin(roles)]

    for detail in (f"{unit}s", f"{unit}s,exact"):
        found = by_site(al.diff(base, adapter, detail=detail, progress=False))

        for name in ("unit_frobenius", "unit_base_norm"):
            for key in expected.dropna(subset=["unit"]).index:
                one, two = expected.loc[key, name], found.loc[key, name]
                np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6, err_msg=f"{detail} {key}")


@pytest.mark.parametrize("kind", KINDS)
def test_spectra_of_an_adapter_are_those_of_its_merge(kind: str) -> None:
    """Singular values, ranks and overlaps from the factors are those of the difference of the weights."""
    base, adapter, merged = made(kind)
    one = by_site(al.diff(base, merged, spectra=3, progress=False))
    two = by_site(al.diff(base, adapter, spectra=3, progress=False))
    one, two = one[one["frobenius"] > 1e-6], two[two["frobenius"] > 1e-6]

    assert sorted(one.index) == sorted(two.index)
    for name in SPECTRA:
        # A merge adds rounding to Δ, whose small singular values count for the effective rank alone.
        rough = 0.02 if name == "effective_rank" else 1e-3
        known = one[name].notna()
        np.testing.assert_allclose(one[name][known], two[name][known], rtol=rough, err_msg=name)
    for key in one.index:
        values = one.loc[key, "singular_values"], two.loc[key, "singular_values"]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "fused", "turned"])
@pytest.mark.parametrize("sides", ["both from factors", "tuned merged", "control merged"])
def test_an_adapter_as_control_stands_beside_as_its_merge_does(kind: str, sides: str) -> None:
    """Angle, share and residue are the same however either change is given, by site and by role."""
    base, adapter, merged = made(kind)
    other = another(kind)
    third = copy.deepcopy(other).merge_and_unload()
    given = {
        "both from factors": (adapter, _saved(other)),
        "tuned merged": (merged, _saved(other)),
        "control merged": (adapter, third),
    }[sides]
    expected = al.diff(base, merged, control=third, progress=False)

    found = al.diff(base, given[0], control=given[1], progress=False)

    one, two = by_site(expected), by_site(found)
    for name in CONTROLS:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=2e-6, err_msg=name)
    for group in ("role", "layer", "tower,role"):
        keys = group.split(",")
        one, two = (side.by(group).set_index(keys).sort_index() for side in (expected, found))
        for name in SUMMED:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=2e-6, err_msg=f"{group} {name}")


def another(kind: str) -> Any:
    """A second adapter over the same base."""
    _, model = adapted(kind)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _saved(model: nn.Module) -> Path:
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_wrapper_s_spelling_changes_nothing(spelling: str, suffix: str, tmp_path: Path) -> None:
    """diff(A, rename(B)) is diff(A, B), site by site and bit by bit."""
    base, tuned = tiny("llama"), nudge(tiny("llama"), "layers")
    names = {SPELLINGS[spelling](name): p.detach().clone() for name, p in tuned.named_parameters()}
    if suffix == ".pth":
        torch.save({"model": names}, tmp_path / "tuned.pth")
    else:
        save_file(names, tmp_path / "tuned.safetensors")

    found = al.diff(base, tmp_path / f"tuned{suffix}", progress=False)

    pd.testing.assert_frame_equal(al.diff(base, tuned, progress=False).frame, found.frame)
    assert list(found.ledger["state"]) == ["paired", "identical"]


@pytest.mark.parametrize("kind", ["lora", "fused"])
def test_blocks_and_threads_change_nothing_for_adapters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts and blocks, and threads, give the same norms, heads and neurons up to rounding."""
    base, adapter, _ = made(kind)

    def measured() -> pd.DataFrame:
        return al.diff(base, adapter, control=adapter, detail="heads,neurons", progress=False).frame

    whole, before = measured(), torch.get_num_threads()
    monkeypatch.setattr(parts, "PART", 1 << 9)
    monkeypatch.setattr(torch_engine, "BLOCK", 1 << 6)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 8)
    one = measured()
    torch.set_num_threads(4)
    try:
        four = measured()
    finally:
        torch.set_num_threads(before)

    # Factors go through matrix products, which a library may add up otherwise on more threads.
    for found in (one, four):
        for name in ("frobenius", "base_norm", "cosine", "control_cosine", "control_along"):
            np.testing.assert_allclose(whole[name], found[name], rtol=LANES, atol=LANES, err_msg=name)
        for name in ("unit_frobenius", "unit_base_norm"):
            for cell, other in zip(whole[name].dropna(), found[name].dropna(), strict=True):
                np.testing.assert_allclose(cell, other, rtol=1e-5, atol=1e-7)
        assert whole[WHERE].equals(found[WHERE])


@pytest.mark.parametrize("kind", KINDS)
def test_squares_of_an_adapter_add_up(kind: str) -> None:
    """Σ‖Δ‖² over any partition is that over the whole merged model."""
    base, adapter, merged = made(kind)
    after = dict(merged.named_parameters())
    whole = sum(
        float((after[name].double() - before.double()).square().sum())
        for name, before in base.named_parameters()
    )
    drift = al.diff(base, adapter, progress=False)

    for group in ("role", "layer", "tower", "param", "tower,layer,role"):
        assert pytest.approx(whole, rel=1e-4) == (drift.by(group)["frobenius"] ** 2).sum()


def sides_of(case: str, folder: Path) -> tuple[Any, Any]:
    """A pair whose parameters have to be accounted for."""
    base = tiny("llama")
    tensors = {name: p.detach().clone() for name, p in base.named_parameters()}
    if case == "adapter":
        return made("lora")[:2]
    if case == "live adapter":
        return adapted("lora")
    if case == "saved whole":
        return made("saved whole")[:2]
    if case == "tied":
        del tensors["lm_head.weight"]
    elif case == "resized":
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(6, 32)])
    elif case == "missing and more":
        tensors = {name: t for name, t in tensors.items() if "layers.0.mlp" not in name}
        tensors["audio_proj.weight"] = torch.ones(7, 5)
    elif case == "reshaped":
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.ones(5, 5)
    elif case == "packed":
        del tensors["model.layers.0.mlp.gate_proj.weight"]
        for leaf, shape in {"qweight": (4, 48), "scales": (1, 48), "qzeros": (1, 6), "g_idx": (32,)}.items():
            tensors[f"model.layers.0.mlp.gate_proj.{leaf}"] = torch.ones(shape, dtype=torch.int32)
    if case == "pth":
        torch.save({"model": tensors, "optimizer": {"m": torch.ones(99)}}, folder / "c.pth")
        return base, folder / "c.pth"
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    return base, folder


@pytest.mark.parametrize(
    "case",
    ["adapter", "live adapter", "saved whole", "tied", "resized", "missing and more", "reshaped", "packed",
     "pth"],
)  # fmt: skip
def test_the_ledger_adds_up_to_the_parameters_of_both_sides(case: str, tmp_path: Path) -> None:
    """Whatever the pair, each side's column is its number of parameters, either way round."""
    base, tuned = sides_of(case, tmp_path)
    sides = al.open_checkpoint(base), al.open_checkpoint(tuned, base=base)

    for one, two in (sides, sides[::-1]):
        ledger = al.diff(one, two, progress=False).ledger

        assert one.parameters == ledger["base_parameters"].sum()
        assert two.parameters == ledger["tuned_parameters"].sum()


def test_the_parameters_of_a_checkpoint_are_those_of_the_model() -> None:
    """What the ledger adds up to is what the model has."""
    model = tiny("llama")

    assert sum(p.numel() for p in model.parameters()) == al.open_checkpoint(model).parameters


def attention_seen(model: nn.Module, how: str) -> Iterator[tuple[Tensor, ...]]:
    """Run a model; yield the queries, keys and values that its first layer attends with."""
    seen: list[tuple[Tensor, ...]] = []
    if how == "interface":
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def recording(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((q, k, v))
            return original(module, q, k, v, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = recording
        try:
            _run(model, "sdpa")
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = original
    else:
        part = next(m for m in model.modules() if hasattr(m, how))
        inner = getattr(part, how)

        def taking(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            seen.append(args[:3] if how == "_attn" else found)
            return found

        setattr(part, how, taking)
        try:
            _run(model, "eager")
        finally:
            delattr(part, how)
    yield from seen[0]


def _run(model: nn.Module, attention: str) -> None:
    model.set_attn_implementation(attention)  # type: ignore[operator]
    with torch.no_grad():
        model(input_ids=torch.arange(1, 7)[None], use_cache=False)


@pytest.mark.parametrize("role", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("model_type", ATTENTIONS)
def test_a_part_of_a_fused_projection_is_what_the_forward_pass_takes_it_for(
    model_type: str, role: str
) -> None:
    """Where k's part alone moved, the module's keys alone change, and the diff says k_proj alone."""
    base = tiny_of(model_type).float()
    tuned = copy.deepcopy(base)
    checkpoint = from_module(tuned)
    (site,) = checkpoint.sites.where(role=role, layer=0, param="weight")
    where = checkpoint.storage[site]
    before = [x.clone() for x in attention_seen(base, ATTENTIONS[model_type])]
    with torch.no_grad():
        put(dict(tuned.named_parameters())[where.tensor], where, value=changed(checkpoint.read(site)))

    after = list(attention_seen(tuned, ATTENTIONS[model_type]))
    moved = al.diff(base, tuned, progress=False).frame.query("frobenius > 0")

    assert where.cut is not None
    unlike = [differ(one, two) for one, two in zip(before, after, strict=True)]
    assert {"q_proj": [True, False, False], "k_proj": [False, True, False], "v_proj": [False, False, True]}[
        role
    ] == unlike
    assert [(role, 0, "weight")] == list(moved[["role", "layer", "param"]].itertuples(index=False, name=None))
    assert pytest.approx(0.1 * math.sqrt(where.size), rel=1e-3) == moved["frobenius"].item()


@pytest.mark.parametrize("role", ["gate_proj", "up_proj"])
def test_a_fused_gate_is_what_goes_into_the_activation(role: str) -> None:
    """Where up's part alone moved, what the activation is given stays as it was."""
    base = tiny_of("phi3").float()
    tuned = copy.deepcopy(base)
    checkpoint = from_module(tuned)
    (site,) = checkpoint.sites.where(role=role, layer=0, param="weight")
    where = checkpoint.storage[site]
    with torch.no_grad():
        put(dict(tuned.named_parameters())[where.tensor], where, value=changed(checkpoint.read(site)))

    seen = []
    for model in (base, tuned):
        mlp = model.model.layers[0].mlp  # type: ignore[union-attr]
        hook = mlp.activation_fn.register_forward_hook(lambda _, given, __: seen.append(given[0]))
        with torch.no_grad():
            mlp(torch.linspace(-1, 1, base.config.hidden_size)[None])  # type: ignore[union-attr]
        hook.remove()

    assert differ(*seen) == (role == "gate_proj")
    assert [role] == al.diff(base, tuned, progress=False).frame.query("frobenius > 0")["role"].tolist()


@pytest.mark.parametrize("model_type", MIXTURES)
def test_stacked_experts_are_told_apart_as_the_forward_pass_does(model_type: str) -> None:
    """Twice all of up is twice the output, twice all of gate is not; one expert's gate is one site."""
    base = tiny_of(model_type).float()
    block = next(m for m in base.modules() if {"experts", "input_linear"} & dict(m.named_children()).keys())
    checkpoint, parameters = from_module(base), dict(base.named_parameters())
    x = torch.randn(1, 5, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = _output(block, x)
    for role, linear in (("up_proj", True), ("gate_proj", False)):
        sites = [s for s in checkpoint.sites.where(role=role, layer=0) if s.expert is not None]
        kept = {site: checkpoint.read(site).clone() for site in sites}
        for site in sites:
            _write(parameters, checkpoint, site, 2 * kept[site])

        assert linear == torch.allclose(2 * plain, _output(block, x), rtol=1e-4, atol=1e-6)
        for site in sites:
            _write(parameters, checkpoint, site, kept[site])

    tuned = copy.deepcopy(base)
    after = from_module(tuned)
    (one,) = (s for s in after.sites.where(role="gate_proj", layer=1) if s.expert == 2)
    _write(dict(tuned.named_parameters()), after, one, changed(after.read(one)))
    moved = al.diff(base, tuned, progress=False).frame.query("frobenius > 0")

    assert [("gate_proj", 1, 2)] == list(
        moved[["role", "layer", "expert"]].itertuples(index=False, name=None)
    )


def _output(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = block(x)
    return found[0] if isinstance(found, tuple) else found


def _write(parameters: dict[str, nn.Parameter], checkpoint: Any, site: Site, value: Tensor) -> None:
    where = checkpoint.storage[site]
    with torch.no_grad():
        put(parameters[where.tensor], where, value=value)


def test_an_adapter_of_an_adapter_s_base_is_measured_between_the_two(tmp_path: Path) -> None:
    """Two LoRAs over one base (MiniGPT-v2 → Emotion-LLaMA): Δ is the difference of their products."""
    base, first, _ = made("lora")
    tensors = load_file(_saved(another("lora")) / "adapter_model.safetensors")
    alone = {f"llama_model.{name}": t for name, t in tensors.items() if "q_proj" in name}
    torch.save({"model": alone}, tmp_path / "second.pth")
    before = al.open_checkpoint(first, base=base)
    after = al.open_checkpoint(tmp_path / "second.pth", base=base, alpha=6)

    drift = al.diff(before, tmp_path / "second.pth", alpha=6, progress=False)

    for site, norm in zip(drift.sites, drift.frame["frobenius"], strict=True):
        expected = float((after.read(site).double() - before.read(site).double()).norm())
        assert pytest.approx(expected, rel=1e-5, abs=1e-6) == norm
    assert drift.where(role="q_proj").frame["frobenius"].min() > 0
    assert drift.where(role="gate_proj").frame["frobenius"].min() > 0  # the first's, taken back
    assert drift.where(role="k_proj").frame["frobenius"].max() == 0
