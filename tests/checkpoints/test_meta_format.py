"""Files in the format of Meta and Mistral read as transformers stores the same model, or are left out."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import CheckpointError, NoSuchSite
from tests.small_models import nudge
from tests.tiny_models import tiny as tiny_of

pytestmark = pytest.mark.filterwarnings("ignore:.*")

TEXT = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe": "feed_forward",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
TOWER = {
    "attention.q_proj": "attention.wq",
    "attention.k_proj": "attention.wk",
    "attention.v_proj": "attention.wv",
    "attention.o_proj": "attention.wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
AROUND = {
    "multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
    "multi_modal_projector.norm": "pre_mm_projector_norm",
    "multi_modal_projector.patch_merger": "patch_merger",
}


def unturned(weight: Tensor, size: int) -> Tensor:
    """Put rows into the order of Meta: the inverse of `permute` in transformers' conversion of LLaMA."""
    count = weight.shape[0] // size
    return weight.view(count, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def meta_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").removeprefix("language_model.")
    for theirs, ours in AROUND.items():
        if name.startswith(theirs):
            return name.replace(theirs, ours)
    if name.startswith("vision_tower."):
        name = name.replace("vision_tower.", "vision_encoder.")
        names = TOWER
    else:
        name, names = name.removeprefix("model."), TEXT
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def meta(weights: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the tensors of a file of transformers as Meta or Mistral would store them."""
    found = {}
    for name, value in weights.items():
        turned = re.search(r"(attention|self_attn)\.[qk]_proj\.(?!lora_A)", name)
        size = sizes["vision" if "vision_tower" in name else "language"]
        found[meta_name(name)] = unturned(value, size) if turned else value.contiguous()
    return found


def sizes_of(config: Any) -> dict[str, int]:
    text = getattr(config, "text_config", config)
    found = {"language": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads}
    if hasattr(config, "vision_config"):
        vision = config.vision_config
        found["vision"] = vision.hidden_size // vision.num_attention_heads
    return found


def saved(model: nn.Module, folder: Path, *, params: Mapping[str, Any] | None = None) -> Path:
    """Save a model in both formats; return the folder of Meta's."""
    model.save_pretrained(folder / "hf")  # type: ignore[operator]
    weights = load_file(folder / "hf" / "model.safetensors")
    out = folder / "meta"
    out.mkdir()
    save_file(meta(weights, sizes_of(model.config)), out / "consolidated.safetensors")
    if params is not None:
        (out / "params.json").write_text(json.dumps(params))
    return out


KINDS = ("llama", "mistral", "mixtral", "mistral3")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_did_not_move(kind: str, tmp_path: Path) -> None:
    """Every parameter of a model in Meta's format has its partner, and equals it."""
    out = saved(tiny_of(kind).float(), tmp_path)
    assert any("wq" in name for name in load_file(out / "consolidated.safetensors"))

    drift = al.diff(tmp_path / "hf", out, progress=False)

    assert {"paired": 0, "identical": len(drift)} == dict(
        zip(drift.ledger["state"], drift.ledger["sites"], strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuning_in_meta_s_format_drifts_as_in_transformers(kind: str, tmp_path: Path) -> None:
    """Also head by head and singular value by singular value."""
    tiny_of(kind).float().save_pretrained(tmp_path / "base")
    tuned = nudge(tiny_of(kind).float(), "layers")
    out = saved(tuned, tmp_path)

    found, expected = (
        al.diff(tmp_path / "base", side, detail="heads", spectra=2, progress=False)
        for side in (out, tmp_path / "hf")
    )

    for column in ("frobenius", "relative", "max_abs", "spectral_norm"):
        one, two = (side.frame[column].fillna(-1).tolist() for side in (found, expected))
        assert pytest.approx(two, rel=1e-5) == one
    one, two = (side.by("head")["frobenius"].tolist() for side in (found, expected))
    assert pytest.approx(two, rel=1e-5) == one


@pytest.mark.parametrize("file", ["consolidated.00.pth", "consolidated.safetensors"])
@pytest.mark.parametrize("params", [{"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}, {}, None, [1]])
def test_heads_are_those_of_params_or_of_base(file: str, params: Any, tmp_path: Path) -> None:
    """Whatever kind of file holds the weights; as base, only its own params can say it."""
    out = saved(tiny_of("llama").float(), tmp_path, params=params)
    if file.endswith("pth"):
        torch.save(load_file(out / "consolidated.safetensors"), out / file)
        (out / "consolidated.safetensors").unlink()

    assert 0.0 == al.diff(tmp_path / "hf", out, progress=False).frame["frobenius"].max()
    back = al.diff(out, tmp_path / "hf", progress=False)
    assert 0.0 == back.frame["frobenius"].max()
    known = isinstance(params, dict) and "n_heads" in params
    assert ({"q_proj", "k_proj"} <= set(back.frame["role"])) == known
    assert any("Meta's order" in finding for finding in back.findings) != known


def test_without_heads_q_and_k_are_not_there(tmp_path: Path) -> None:
    """Neither to read nor to transplant: their order is unknown."""
    out = saved(tiny_of("llama").float(), tmp_path)
    opened = al.open_checkpoint(out)

    assert {"v_proj", "o_proj"} == {
        site.role for site in opened.sites if site.role in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert 4 == sum("Meta's order" in why for why, _ in opened.skipped.values())
    lens = al.Lens(tiny_of("llama").float())
    q = lens.sites.where(role="q_proj")
    with pytest.raises(NoSuchSite), lens.intervene(al.Transplant(q, donor=opened)):
        pass


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_transplant_of_the_same_model_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Rows of q and k are put into the order of the live model."""
    out = saved(tiny_of(kind).float(), tmp_path)
    lens = al.Lens(tiny_of(kind).float())
    before = {site: lens.checkpoint.read(site).clone() for site in lens.sites}

    with lens.intervene(al.Transplant(lens.sites, donor=out)):
        after = {site: lens.checkpoint.read(site).clone() for site in lens.sites}

    assert [] == [site for site in lens.sites if not torch.equal(before[site], after[site])]


def test_some_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    """A slice is read across the heads in which its rows are stored."""
    opened = al.open_checkpoint(saved(tiny_of("llama").float(), tmp_path, params={"n_heads": 4}))
    for role in ("q_proj", "k_proj"):
        site = opened.sites.where(role=role)[0]
        whole = opened.read(site)
        for first, last in ((0, 5), (3, 30), (7, 7), (20, 100)):
            assert torch.equal(whole[first:last], opened.read(site, slice(first, last)))


ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "k alone": {"target_modules": ["k_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_in_meta_s_format_is_that_of_peft(case: str, tmp_path: Path) -> None:
    """Rows of B, and DoRA's magnitudes, lie in Meta's order; `params.json` says the scale."""
    base = tiny_of("llama").float()
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_of("llama").float(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **ADAPTERS[case])
    )
    model.save_pretrained(tmp_path / "peft")
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    out = tmp_path / "meta"
    out.mkdir()
    save_file(meta(weights, sizes_of(base.config)), out / "lora.safetensors")
    (out / "params.json").write_text(
        json.dumps({"dim": 64, "lora": {"enable": True, "rank": 4, "scaling": 2.0}})
    )

    found, expected = (
        al.diff(tmp_path / "base", side, detail="heads", progress=False) for side in (out, tmp_path / "peft")
    )

    assert pytest.approx(expected.frame["frobenius"].tolist(), rel=1e-5) == found.frame["frobenius"].tolist()
    one, two = (side.by("head")["frobenius"].tolist() for side in (found, expected))
    assert pytest.approx(two, rel=1e-5) == one
    if case == "all":
        (out / "params.json").unlink()
        assert "No file gives LoRA's alpha" in " ".join(
            al.diff(tmp_path / "base", out, progress=False).findings
        )


def test_it_is_not_written(tmp_path: Path) -> None:
    """The error says what it is."""
    out = saved(tiny_of("llama").float(), tmp_path, params={"n_heads": 4})
    gates = al.open_checkpoint(out).sites.where(role="gate_proj")

    with pytest.raises(CheckpointError, match="is in Meta's format"):
        al.write(out, al.Scale(gates, factor=2.0), tmp_path / "written")
