"""An adapter over its base reads like PEFT's own merge, for every kind of LoRA and every way to save it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import affectlens as al
from affectlens.checkpoints.memory import from_module
from affectlens.checkpoints.opening import look
from affectlens.errors import CheckpointError, NothingToCompare
from tests.tiny_models import tiny as tiny_of

GATED = ["gate_proj", "up_proj", "down_proj", "q_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": GATED}),
    "rslora": ("llama", {"target_modules": GATED, "use_rslora": True}),
    "dora": ("llama", {"target_modules": GATED, "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": GATED,
            "rank_pattern": {"up_proj": 2, r"^model\.layers\.0\.mlp\.gate_proj": 3},
            "alpha_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 7},
        },
    ),
    "saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "mlp.gate_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "turned": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "turned dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "fused dora": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "vision and convolution": (
        "llava",
        {"target_modules": ["patch_embedding", "fc1", "q_proj", "gate_proj"]},
    ),
    "bias of B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias of a fused B": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "rows of tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 5], "lm_head": [3]}},
    ),
    "rows of tied tokens": ("gemma2", {"target_modules": ["q_proj"], "trainable_token_indices": [4, 2]}),
    "parameters of a linear layer": (
        "llama",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
    ),
    **{
        f"experts of {model_type}": (
            model_type,
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                "rank_pattern": {r".*\.1\..*down_proj": 2},
                "use_rslora": True,
            },
        )
        for model_type in ("mixtral", "gpt_oss", "llama4_text", "qwen3_vl_moe", "granitemoe")
    },
    "experts by their leaf": ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}),
    "experts laid end to end": ("dbrx", {"target_modules": [], "target_parameters": ["mlp.w2"]}),
}


def adapted(kind: str, *, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Return a base and the same model with an adapter of random tensors."""
    model_type, settings = KINDS[kind]
    torch.manual_seed(seed)
    base = tiny_of(model_type).float()
    copy = tiny_of(model_type).float()
    copy.load_state_dict(base.state_dict())
    model = get_peft_model(copy, LoraConfig(r=4, lora_alpha=6, **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                length = 1.0 if "magnitude" in name else 0.0
                parameter.copy_(length * parameter + 0.1 * torch.randn_like(parameter))
    return base, model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, nn.Module]]:
    found: dict[str, tuple[Path, Path, nn.Module]] = {}

    def make(kind: str) -> tuple[Path, Path, nn.Module]:
        if kind not in found:
            folder = tmp_path_factory.mktemp("adapter")
            base, model = adapted(kind)
            base.save_pretrained(folder / "base")
            model.save_pretrained(folder / "adapter")
            found[kind] = folder / "base", folder / "adapter", model.merge_and_unload()
        return found[kind]

    return make


@pytest.mark.filterwarnings("ignore:.*")  # PEFT has much to say of each kind
@pytest.mark.parametrize("kind", KINDS)
def test_effective_weights_are_those_of_peft_s_merge(
    kind: str, saved: Callable[[str], tuple[Path, Path, nn.Module]]
) -> None:
    """Every site of the opened adapter equals the merged model's, to float32 rounding."""
    base, adapter, merged = saved(kind)
    found, expected = al.open_checkpoint(adapter, base=base), from_module(merged)

    assert set(expected.sites) == set(found.sites)
    for site in expected.sites:
        torch.testing.assert_close(expected.read(site), found.read(site).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("kind", KINDS)
def test_the_drift_of_an_adapter_is_that_of_its_merge(
    kind: str, saved: Callable[[str], tuple[Path, Path, nn.Module]]
) -> None:
    """Norms from factors, from exact blocks and from the merged model agree; squares add up."""
    base, adapter, merged = saved(kind)
    merge = al.diff(base, merged, progress=False).frame.set_index(["parameter", "role"])
    for detail in (None, "exact"):
        found = al.diff(base, adapter, detail=detail, progress=False).frame.set_index(["parameter", "role"])

        assert sorted(merge.index) == sorted(found.index)
        for name in ("frobenius", "base_norm", "relative", "rms", "cosine"):
            one, two = (side[name].loc[merge.index].to_numpy(float) for side in (merge, found))
            assert np.allclose(one, two, rtol=1e-5, atol=1e-6, equal_nan=True), name
        assert 0 < found["targeted"].sum() < len(found)
        assert not found.loc[~found["targeted"], "frobenius"].any()


@pytest.mark.filterwarnings("ignore:.*")
def test_elementwise_measures_need_the_exact_way(
    saved: Callable[[str], tuple[Path, Path, nn.Module]],
) -> None:
    """Computed from factors they are null; computed block by block they equal the merge's."""
    base, adapter, merged = saved("lora")
    names = ["mean_abs", "max_abs", "changed", "sign_flips"]

    quick = al.diff(base, adapter, progress=False).where(targeted=True).frame
    exact = al.diff(base, adapter, detail="exact", progress=False).where(targeted=True).frame
    merge = al.diff(base, merged, progress=False).frame.set_index("parameter").loc[exact["parameter"]]

    assert quick[names].isna().all().all()
    torch.testing.assert_close(
        torch.tensor(exact[names].to_numpy(float)),
        torch.tensor(merge[names].to_numpy(float)),
        rtol=1e-4,
        atol=2,
    )


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "kind",
    [
        "lora", "saved whole", "fused", "bias of B", "rows of tokens", "rows of tied tokens",
        "experts of mixtral", "experts of gpt_oss",
    ],
)  # fmt: skip
def test_a_live_model_with_an_adapter_is_read_as_what_it_computes(kind: str) -> None:
    """A live model with an adapter reads like its merge, over its own base."""
    base, model = adapted(kind)
    found = al.diff(base, model, progress=False).frame.set_index("parameter")["frobenius"]
    expected = al.diff(base, model.merge_and_unload(), progress=False).frame.set_index("parameter")[
        "frobenius"
    ]

    assert pytest.approx(expected.to_dict(), rel=1e-5, abs=1e-6) == found.to_dict()


def bare(adapter: Path, prefix: str, *, infix: str = ".default") -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that MiniGPT-like trainers give them."""
    renamed = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        stem = name.removeprefix("base_model.model.").removesuffix(".weight")
        renamed[f"{prefix}{stem}{infix}.weight"] = tensor
    return renamed


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("infix", ["", ".default"])
def test_trainables_of_a_minigpt_like_pth(
    infix: str, saved: Callable[[str], tuple[Path, Path, nn.Module]], tmp_path: Path
) -> None:
    """LoRA under `model` beside optimizer state, with a wrapper's prefix, opens with the caller's alpha."""
    base, adapter, merged = saved("lora")
    model = bare(adapter, "llama_model.base_model.model.", infix=infix)
    model["affectgpt_proj.weight"] = torch.ones(4, 4)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(50)}}}
    torch.save({"model": model, "optimizer": optimizer, "epoch": 60}, tmp_path / "checkpoint_60.pth")
    expected = al.diff(base, merged, progress=False).frame.set_index("parameter")["frobenius"]

    drift = al.diff(base, tmp_path / "checkpoint_60.pth", alpha=6, progress=False)

    found = drift.frame.set_index("parameter")["frobenius"]
    assert pytest.approx(expected.to_dict(), rel=1e-5, abs=1e-6) == found.to_dict()
    assert 16 == drift.ledger.set_index("state").loc["only-tuned", "tuned_parameters"]
    assert "optimizer" in " ".join(drift.findings)


@pytest.mark.filterwarnings("ignore:.*")
def test_without_alpha_the_drift_is_known_up_to_a_factor(
    saved: Callable[[str], tuple[Path, Path, nn.Module]], tmp_path: Path
) -> None:
    """Ratios between modules hold, a finding says so, and reading the weights is an error."""
    base, adapter, _ = saved("lora")
    torch.save({"model": bare(adapter, "llama_model.base_model.model.")}, tmp_path / "c.pth")
    known = al.diff(base, tmp_path / "c.pth", alpha=6, progress=False).where(targeted=True).frame
    drift = al.diff(base, tmp_path / "c.pth", progress=False)

    found = drift.where(targeted=True).frame
    ratio = known["frobenius"] / found["frobenius"]

    assert pytest.approx([6.0] * len(ratio)) == ratio.tolist()
    assert found["cosine"].isna().all()
    assert "up to" in " ".join(drift.findings)
    site = drift.where(targeted=True).sites[0]
    with pytest.raises(CheckpointError, match="no file says alpha"):
        al.open_checkpoint(tmp_path / "c.pth", base=base).read(site)


@pytest.mark.filterwarnings("ignore:.*")
def test_presets_know_alpha_and_rank(
    saved: Callable[[str], tuple[Path, Path, nn.Module]], tmp_path: Path
) -> None:
    """A preset of another rank is refused, and an unknown preset lists the known ones."""
    base, adapter, _ = saved("lora")
    torch.save({"model": bare(adapter, "llama_model.base_model.model.")}, tmp_path / "c.pth")

    with pytest.raises(CheckpointError, match="have rank 4, but its config or the preset says 16"):
        al.diff(base, tmp_path / "c.pth", preset="affectgpt", progress=False)
    with pytest.raises(CheckpointError, match="Did you mean 'salmonn'"):
        al.diff(base, tmp_path / "c.pth", preset="salmon", progress=False)


@pytest.mark.filterwarnings("ignore:.*")
def test_non_lora_trainables_lie_beside_an_adapter(
    saved: Callable[[str], tuple[Path, Path, nn.Module]], tmp_path: Path
) -> None:
    """Tensors that LLaVA's trainers save beside an adapter are part of the tuned model."""
    base, adapter, _ = saved("lora")
    folder = tmp_path / "beside"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    norm = load_file(base / "model.safetensors")["model.norm.weight"]
    torch.save({"base_model.model.model.norm.weight": norm + 1}, folder / "non_lora_trainables.bin")

    row = al.diff(base, folder, progress=False).where(parameter="model.norm.weight").frame.iloc[0]

    assert (True, math.sqrt(norm.numel())) == (row["targeted"], pytest.approx(row["frobenius"], rel=1e-6))


@pytest.mark.filterwarnings("ignore:.*")
def test_heads_and_rows_of_an_adapted_site(saved: Callable[[str], tuple[Path, Path, nn.Module]]) -> None:
    """Heads and rows of effective weights equal those of the whole site."""
    base, adapter, _ = saved("dora")
    checkpoint = al.open_checkpoint(adapter, base=base)
    gate = checkpoint.sites.where(role="gate_proj", layer=1)[0]

    whole = checkpoint.read(gate)

    torch.testing.assert_close(whole[3:9], checkpoint.read(gate, slice(3, 9)))
    torch.testing.assert_close(whole[5:6], checkpoint.read(gate.at(neuron=5)))


def broken(tensors: dict[str, torch.Tensor], config: dict[str, Any], what: str) -> None:
    """Break an adapter in one way."""
    first = sorted(name for name in tensors if "lora_A" in name)[0]
    if what == "no other half":
        del tensors[first]
    elif what == "another layer":
        for name in list(tensors):
            tensors[name.replace("layers.1", "layers.99").replace("layers.0", "layers.98")] = tensors.pop(
                name
            )
    elif what == "another width":
        tensors[first] = torch.zeros(4, 7)
    elif what == "no product":
        tensors[first] = torch.zeros(5, tensors[first].shape[1])
    elif what == "NaN in a factor":
        tensors[first][0, 0] = math.nan
    elif what == "no magnitude":
        config["use_dora"] = True
    elif what == "short magnitude":
        tensors[first.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(3)
    elif what == "two pairs":
        for name in [name for name in tensors if name.startswith(first.partition(".lora_")[0])]:
            tensors[name.removeprefix("base_model.model.")] = tensors[name].clone()
    elif what == "whole numbers":
        tensors[first] = tensors[first].int()
    elif what == "floats of a byte":
        tensors[first] = tensors[first].to(torch.float8_e4m3fn)
    elif what == "two adapters":
        tensors[first.replace("lora_A", "lora_A.other")] = tensors[first].clone()
    else:
        config |= {
            "NaN alpha": {"lora_alpha": math.nan},
            "catastrophic pattern": {"alpha_pattern": {r"([a-z._0-9]|[a-z]|\w)+[0-9]": 3}},
            "another rank": {"r": 5},
            "no rank": {"r": 0},
            "DoRA in words": {"use_dora": "false"},
            "not LoRA": {"peft_type": "IA3"},
            "part of the base moved": {"init_lora_weights": "pissa_niter_4"},
            "layers replicated": {"layer_replication": [[0, 2]]},
        }[what]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no other half", "lora_B without lora_A"),
        ("another layer", "none of the 8 LoRA pairs"),
        ("another width", "its factors make"),
        ("no product", "can't be multiplied"),
        ("NaN in a factor", "NaN or infinity"),
        ("no magnitude", "DoRA without its magnitude"),
        ("two adapters", "several adapters"),
        ("two pairs", "names the same parameter as"),
        ("whole numbers", "a factor of int32"),
        ("floats of a byte", "a factor of float8_e4m3fn"),
        ("DoRA in words", "use_dora must be true or false, got 'false'"),
        ("NaN alpha", "lora_alpha must be a number"),
        ("catastrophic pattern", "takes too long to match"),
        ("another rank", "have rank 4, but its config or the preset says 5"),
        ("no rank", "r must be a whole number between 1 and 1,000,000,000, got 0"),
        ("short magnitude", r"magnitudes of shape \(3,\) for"),
        ("not LoRA", "a 'IA3' adapter"),
        ("part of the base moved", "moved part of the base"),
        ("layers replicated", "layer_replication"),
    ],
)
def test_a_broken_adapter_is_a_clear_error(
    what: str, message: str, saved: Callable[[str], tuple[Path, Path, nn.Module]], tmp_path: Path
) -> None:
    """An adapter that PEFT would silently load wrong is refused; without its base too, where possible."""
    base, adapter, _ = saved("lora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    broken(tensors, config, what)
    folder = tmp_path / "broken"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises((CheckpointError, NothingToCompare), match=message):
        al.diff(base, folder, progress=False)
    if what not in ("another layer", "another width", "NaN in a factor"):
        with pytest.raises(CheckpointError, match=message):
            look(folder)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_against_what_peft_saves(
    kind: str, saved: Callable[[str], tuple[Path, Path, nn.Module]]
) -> None:
    """A sound adapter of any kind, looked at alone, has no note."""
    _, adapter, _ = saved(kind)

    assert [] == [line for line in look(adapter).lines() if line[0] == "beside"]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"target_modules": ["zorb"]}, "8 modules with factors are outside its target_modules"),
        ({"layers_to_transform": [1]}, "4 modules with factors are outside its layers_to_transform"),
        ({"lora_alpha": -6}, "alpha is negative (-6)"),
    ],
)
def test_a_config_that_contradicts_its_factors_is_told(
    settings: dict[str, Any],
    note: str,
    saved: Callable[[str], tuple[Path, Path, nn.Module]],
    tmp_path: Path,
) -> None:
    """If PEFT would load other tensors than the file has, there is a finding, and a line in `inspect`."""
    base, adapter, _ = saved("lora")
    save_file(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    assert note in " ".join(al.diff(base, tmp_path, progress=False).findings)
    assert note in " ".join(value for _, value in look(tmp_path).lines())


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.filterwarnings("ignore:.*")
def test_bare_parameters_of_one_shape_are_left_out_and_unknown(tmp_path: Path) -> None:
    """If shapes don't say which factors are whose, no parameter of the module is said not to have moved."""
    save, bare = tiny_of("dbrx").float().save_pretrained, ["mlp.w1", "mlp.w2"]
    save(tmp_path / "base")
    for name, targets in (("both", ["out_proj"]), ("alone", [])):
        config = LoraConfig(target_modules=targets, target_parameters=bare, init_lora_weights=False)
        get_peft_model(tiny_of("dbrx").float(), config).save_pretrained(tmp_path / name)

    drift = al.diff(tmp_path / "base", tmp_path / "both", progress=False)

    assert {"o_proj"} == set(drift.frame.query("frobenius > 0")["role"])
    assert not set(drift.frame["parameter"].str.rpartition(".")[2]) & {"w1", "w2"}
    assert "v1" in set(drift.frame["parameter"].str.rpartition(".")[2])
    assert "target_parameters" in " ".join(drift.findings)
    with pytest.raises(CheckpointError, match="nothing in it can be read: factors of a bare parameter"):
        al.diff(tmp_path / "base", tmp_path / "alone", progress=False)


@pytest.mark.filterwarnings("ignore:.*")
def test_the_factors_of_tied_embeddings_count_once(tmp_path: Path) -> None:
    """With `ensure_weight_tying` PEFT saves them for both embeddings, which stay one matrix."""
    tiny_of("gemma2").float().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = get_peft_model(tiny_of("gemma2").float(), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "adapter")
    embedding = model.base_model.model.model.embed_tokens  # type: ignore[union-attr, operator]

    drift = al.diff(tmp_path / "base", tmp_path / "adapter", progress=False)

    moved = drift.frame.query("frobenius > 0").set_index("role")["frobenius"]
    assert {"embed_tokens", "q_proj"} == set(moved.index)
    expected = float(embedding.get_delta_weight("default").norm())  # type: ignore[operator, union-attr]
    assert pytest.approx(expected, rel=1e-5) == moved["embed_tokens"]
    assert not any("would not load" in finding for finding in drift.findings)


@pytest.mark.filterwarnings("ignore:.*")
def test_an_activated_lora_is_named(tmp_path: Path) -> None:
    """Its change is not that of a merged model: it begins at its invocation tokens."""
    tiny_of("llama").float().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    get_peft_model(tiny_of("llama").float(), config).save_pretrained(tmp_path / "adapter")

    drift = al.diff(tmp_path / "base", tmp_path / "adapter", progress=False)

    assert any("aLoRA" in finding and "invocation tokens" in finding for finding in drift.findings)


BAD_TOKENS: dict[str, tuple[object, str]] = {
    "none": (None, "its config lists no tokens"),
    "of another module": ({"lm_head": [1, 2]}, "its config lists no tokens"),
    "too few": ([1], "rows of shape"),
    "twice the same": ([1, 1], "must differ"),
    "beyond the vocabulary": ([1, 10**6], "must differ and be below"),
    "negative": ([1, -1], "must differ and be below"),
    "no numbers": (["a", "b"], "its config lists no tokens"),
}


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("case", BAD_TOKENS)
def test_rows_of_tokens_that_the_config_does_not_explain(case: str, tmp_path: Path) -> None:
    """Each is a clear error."""
    stated, reason = BAD_TOKENS[case]
    tiny_of("llama").float().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    get_peft_model(tiny_of("llama").float(), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": stated}))

    with pytest.raises(CheckpointError, match=reason):
        al.diff(tmp_path / "base", tmp_path / "adapter", progress=False)


@pytest.mark.filterwarnings("ignore:.*")
def test_an_adapter_of_whole_tensors_that_base_lacks_is_an_error(tmp_path: Path) -> None:
    """Base alone would be compared with itself."""
    tiny_of("llama").float().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"])
    get_peft_model(tiny_of("llama").float(), config).save_pretrained(tmp_path / "adapter")
    save_file({"encoder.block.0.wi": torch.ones(4, 4)}, tmp_path / "adapter" / "adapter_model.safetensors")

    with pytest.raises(NothingToCompare, match="none of the 1 parameters of adapter"):
        al.diff(tmp_path / "base", tmp_path / "adapter", progress=False)


def test_an_adapter_alone_needs_its_base(saved: Callable[[str], tuple[Path, Path, nn.Module]]) -> None:
    """The base that a config names is never opened: the path comes from a stranger."""
    _, adapter, _ = saved("lora")

    with pytest.raises(CheckpointError, match="Pass base="):
        al.open_checkpoint(adapter)
