"""Checkpoints of every form people have, end to end: torch's files, packed weights, hubs, oddities."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi, close_session, constants
from huggingface_hub.hf_api import RepoFile
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import affectlens as al
from affectlens.checkpoints.hub import remote
from affectlens.checkpoints.safetensors import INDEX
from affectlens.errors import CheckpointError, NothingToCompare
from tests.checkpoints.hub.hub_server import Hub, git_oid, serving
from tests.checkpoints.test_quantized import nf4
from tests.numbers import LANES
from tests.small_models import nudge, tiny
from tests.tiny_models import tiny as tiny_of

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # PEFT has much to say

GATE = "model.layers.0.mlp.gate_proj.weight"
BASE = tiny("llama")
TUNED = nudge(tiny("llama"), "layers")
BEFORE = {name: p.detach().clone() for name, p in BASE.named_parameters()}
AFTER = {name: p.detach().clone() for name, p in TUNED.named_parameters()}

# what a trainer puts around the weights → whether a note says what was left out
ENVELOPES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "bare": (lambda weights: weights, ""),
    "model and optimizer": (
        lambda weights: {
            "model": weights,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(7)}}},
            "epoch": 3,
        },
        "optimizer was left out (1 tensors, 7 elements)",
    ),
    "lightning": (
        lambda weights: {"state_dict": {f"model.{k}": v for k, v in weights.items()}, "global_step": 9},
        "",
    ),
    "DeepSpeed": (
        lambda weights: {"module": weights, "optimizer": {"m": torch.ones(5)}, "ds_version": "0.15"},
        "optimizer was left out (1 tensors, 5 elements)",
    ),
    "FSDP": (lambda weights: {"model": {"state_dict": weights}, "optim": {"m": torch.ones(4)}}, "optim was"),
    "distributed": (lambda weights: {"model": {f"module.{k}": v for k, v in weights.items()}}, ""),
}

# odd tensors that checkpoints hold
ODD: dict[str, Tensor] = {
    "scalar": torch.tensor(1.5),
    "steps": torch.tensor(5),
    "flags": torch.tensor([True, False, True]),
    "no rows": torch.zeros(0, 4),
    "nothing": torch.zeros(0),
    "ids": torch.arange(10),
    "float64": torch.linspace(0, 1, 12, dtype=torch.float64).reshape(3, 4),
    "bytes": torch.arange(4, dtype=torch.uint8),
    "small": torch.ones(3, dtype=torch.float16),
    "five": torch.ones(2, 1, 3, 1, 2),
    '<img src=x onerror="1">': torch.ones(3),
    "\x1b[31mred": torch.ones(3),
    "a\u202eb": torch.ones(3),
    "=cmd()": torch.ones(2, 2),
    "%s{}": torch.ones(2, 2),
    "n" * 3000: torch.ones(2),
    "": torch.ones(2),
    "..": torch.ones(2),
}


def folder_of(path: Path, weights: dict[str, Tensor], *, config: dict[str, Any] | None = None) -> Path:
    """A folder with one file of safetensors."""
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**BASE.config.to_dict(), **(config or {})}, default=str))
    return path


@pytest.fixture(scope="module")
def plain() -> pd.DataFrame:
    return al.diff(BASE, TUNED, progress=False).frame


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "base", BEFORE)


def complete(drift: al.Drift, base: Any, tuned: Any) -> None:
    """The ledger's columns add up to the parameters of each side."""
    one, two = al.open_checkpoint(base), al.open_checkpoint(tuned, base=base)

    assert one.parameters == drift.ledger["base_parameters"].sum()
    assert two.parameters == drift.ledger["tuned_parameters"].sum()


def state(drift: al.Drift, name: str) -> pd.Series:
    """A row of the ledger."""
    row: pd.Series = drift.ledger.set_index("state").loc[name]
    return row


# torch's own files


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files_in_their_envelopes(
    envelope: str, legacy: bool, plain: pd.DataFrame, base: Path, tmp_path: Path
) -> None:
    """The drift is that of the modules; what else the file holds is told."""
    wrap, note = ENVELOPES[envelope]
    torch.save(wrap(AFTER), tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)

    drift = al.diff(base, tmp_path / "c.pth", progress=False)

    pd.testing.assert_frame_equal(plain, drift.frame)
    assert note in " ".join(drift.findings)
    complete(drift, base, tmp_path / "c.pth")


def test_torch_shards_with_an_index(plain: pd.DataFrame, base: Path, tmp_path: Path) -> None:
    """`pytorch_model-00001-of-00003.bin` and so on are one checkpoint, and either side may be it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(AFTER)
    placed = {name: f"pytorch_model-{k % 3 + 1:05}-of-00003.bin" for k, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({n: AFTER[n] for n in names if placed[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))

    forth, back = al.diff(base, folder, progress=False), al.diff(folder, base, progress=False)

    pd.testing.assert_frame_equal(plain, forth.frame)
    np.testing.assert_allclose(forth.frame["frobenius"], back.frame["frobenius"], rtol=1e-12)
    complete(forth, base, folder)


def test_a_transposed_and_a_shared_tensor_of_a_torch_file(base: Path, tmp_path: Path) -> None:
    """Values that don't lie end to end, or lie in one storage with others, are read as what they are."""
    odd = dict(AFTER)
    odd[GATE] = AFTER[GATE].T.contiguous().T
    both = torch.cat(
        [AFTER["model.layers.0.self_attn.k_proj.weight"], AFTER["model.layers.0.self_attn.v_proj.weight"]]
    )
    odd["model.layers.0.self_attn.k_proj.weight"], odd["model.layers.0.self_attn.v_proj.weight"] = both.chunk(
        2
    )
    torch.save(odd, tmp_path / "odd.pth")

    found = al.diff(base, tmp_path / "odd.pth", progress=False).frame

    expected = al.diff(base, TUNED, progress=False).frame
    np.testing.assert_allclose(expected["frobenius"], found["frobenius"], rtol=LANES)


# packed weights


def fp8(weight: Tensor, block: int = 16) -> tuple[Tensor, Tensor]:
    """A weight in float8 and the scales of its blocks, as DeepSeek-V3 stores them."""
    tall, wide = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
    padded = torch.zeros(tall * block, wide * block)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(tall, block, wide, block)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    numbers = (blocks / scales[:, None, :, None]).view_as(padded).to(torch.float8_e4m3fn)
    return numbers[: weight.shape[0], : weight.shape[1]].contiguous(), scales


def test_fp8_beside_its_original(tmp_path: Path) -> None:
    """The drift is the rounding of three bits, the dtype shows it, and no parameter is lost."""
    half = {name: tensor.bfloat16() for name, tensor in BEFORE.items()}
    packed = dict(half)
    for name in [name for name in half if "_proj" in name]:
        packed[name], packed[f"{name}_scale_inv"] = fp8(half[name].float())
    kind = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    base, tuned = folder_of(tmp_path / "base", half), folder_of(tmp_path / "fp8", packed, config=kind)

    drift = al.diff(base, tuned, progress=False)

    moved = drift.frame[drift.frame["frobenius"] > 0]
    assert 14 == len(moved) == state(drift, "paired")["sites"]
    assert {"bfloat16 → float8_e4m3fn"} == set(moved["dtype"])
    assert moved["relative"].between(0.01, 0.04).all()
    assert (moved["cosine"] > 0.999).all()
    assert "skipped" not in set(drift.ledger["state"])
    complete(drift, base, tuned)


def test_nf4_and_int8_are_read_by_their_values(base: Path, tmp_path: Path) -> None:
    """A weight of 4 bits and one of 8 drift by what they stand for, from either side."""
    known = nf4((48, 32), block=16)
    packed = {name: t for name, t in BEFORE.items() if name != GATE}
    packed |= {key.replace("w.weight", GATE): tensor for key, tensor in known.items()}
    up = GATE.replace("gate", "up")
    most = BEFORE[up].abs().amax(1)
    packed[up] = (BEFORE[up] / most[:, None] * 127).round().to(torch.int8)
    packed[up.replace("weight", "SCB")] = most
    tuned = folder_of(
        tmp_path / "packed", packed, config={"quantization_config": {"quant_method": "bitsandbytes"}}
    )

    drift = al.diff(base, tuned, progress=False)

    rows = drift.frame.set_index("parameter")
    value = al.open_checkpoint(tuned).read(
        al.open_checkpoint(tuned).sites.where(role="gate_proj", layer=0)[0]
    )
    assert pytest.approx(float((value - BEFORE[GATE]).norm()), rel=1e-5) == rows.loc[GATE, "frobenius"]
    assert 0 < rows.loc[up, "relative"] < 0.01
    assert ("float32 → nf4", "float32 → int8") == (rows.loc[GATE, "dtype"], rows.loc[up, "dtype"])
    back = al.diff(tuned, base, progress=False).frame.set_index("parameter")
    assert pytest.approx(rows.loc[GATE, "frobenius"], rel=LANES) == back.loc[GATE, "frobenius"]
    complete(drift, base, tuned)


def gptq(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with one matrix packed in a way that is left alone."""
    packed = {name: t for name, t in weights.items() if name != GATE}
    for leaf, shape in {"qweight": (4, 48), "scales": (1, 48), "qzeros": (1, 6), "g_idx": (32,)}.items():
        packed[GATE.replace("weight", leaf)] = torch.ones(shape, dtype=torch.int32)
    return packed


def test_gptq_is_skipped_and_said_so(base: Path, tmp_path: Path) -> None:
    """Its matrix is in base alone, its packed parts are a row of the ledger, the rest is compared."""
    tuned = folder_of(tmp_path / "gptq", gptq(AFTER))

    drift = al.diff(base, tuned, progress=False)

    assert (4, 4 * 48 + 48 + 6 + 32) == (
        state(drift, "skipped")["sites"],
        state(drift, "skipped")["tuned_parameters"],
    )
    assert BEFORE[GATE].numel() == state(drift, "only-base")["base_parameters"]
    assert "packed by GPTQ" in state(drift, "skipped")["note"]
    assert "packed by GPTQ" in " ".join(drift.findings)
    assert 20 == len(drift)
    complete(drift, base, tuned)


# adapters


def lora(model: nn.Module, folder: Path | None = None, *, seed: int = 3, **settings: Any) -> Any:
    """An adapter of random factors over a model, saved where a folder is given."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings))  # type: ignore[arg-type, assignment]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if folder is not None:
        model.save_pretrained(folder)  # type: ignore[operator]
    return model


def norms(drift: al.Drift) -> dict[str, float]:
    """‖Δ‖ by parameter."""
    return dict(zip(drift.frame["parameter"], drift.frame["frobenius"], strict=True))


def test_an_adapter_over_shards_over_fp8_and_over_torch_s_files(tmp_path: Path) -> None:
    """Whatever form the base has, the factors' norms are theirs, and the exact way agrees."""
    lora(tiny("llama"), tmp_path / "adapter", target_modules=["gate_proj", "q_proj"])
    BASE.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    torch.save(BEFORE, tmp_path / "whole.pth")
    packed = dict(BEFORE)
    packed[GATE], packed[f"{GATE}_scale_inv"] = fp8(BEFORE[GATE])
    folder_of(tmp_path / "fp8", packed, config={"quantization_config": {"weight_block_size": [16, 16]}})
    expected = norms(al.diff(BASE, tmp_path / "adapter", progress=False))

    for name in ("shards", "whole.pth", "fp8"):
        for detail in (None, "exact"):
            drift = al.diff(tmp_path / name, tmp_path / "adapter", detail=detail, progress=False)

            assert pytest.approx(expected, rel=1e-5, abs=1e-6) == norms(drift), name
            complete(drift, tmp_path / name, tmp_path / "adapter")


def test_factors_of_what_base_has_packed_are_counted_and_told(tmp_path: Path) -> None:
    """A LoRA over GPTQ: where base can't be read its factors are skipped, elsewhere they are measured."""
    folder_of(tmp_path / "gptq", gptq(BEFORE))
    lora(tiny("llama"), tmp_path / "adapter", target_modules=["gate_proj"])

    drift = al.diff(tmp_path / "gptq", tmp_path / "adapter", progress=False)

    assert [1] == drift.frame.query("frobenius > 0")["layer"].tolist()
    assert "changes a parameter that base does not have" in " ".join(drift.findings)
    complete(drift, tmp_path / "gptq", tmp_path / "adapter")


def test_a_live_model_under_an_adapter_is_not_its_base(base: Path) -> None:
    """Where the model below the factors was tuned too, that is part of the drift."""
    model = lora(nudge(tiny("llama"), "layers", scale=0.05), target_modules=["q_proj"])
    merged = copy.deepcopy(model).merge_and_unload()

    drift = al.diff(base, model, progress=False)

    expected = norms(al.diff(base, merged, progress=False))
    assert pytest.approx(expected, rel=1e-5, abs=1e-6) == norms(drift)


def test_a_live_adapter_says_what_it_could_not_touch(base: Path) -> None:
    """As with its files: targeted sites apart from the others, whole ones among them."""
    model = lora(tiny("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])

    drift = al.diff(base, model, progress=False)

    assert {"q_proj", "lm_head"} == set(drift.where(targeted=True).frame["role"])
    assert 18 == state(drift, "not-targeted")["sites"]
    complete(drift, base, model)


def test_the_state_dict_of_a_model_under_an_adapter_holds_its_own_base(base: Path, tmp_path: Path) -> None:
    """Also as older PEFT named it, `q_proj.weight` beside `q_proj.lora_A.weight`."""
    model = lora(nudge(tiny("llama"), "layers", scale=0.05), target_modules=["q_proj"])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "new.pth")
    torch.save({"model": {n.replace(".base_layer", ""): t for n, t in weights.items()}}, tmp_path / "old.pth")
    expected = norms(al.diff(base, model, progress=False))

    for name in ("new.pth", "old.pth"):
        drift = al.diff(base, tmp_path / name, alpha=4, progress=False)

        assert pytest.approx(expected, rel=1e-5, abs=1e-6) == norms(drift), name


def test_an_adapter_that_is_merged_and_still_there_counts_once(base: Path) -> None:
    """Its factors are in the weights already."""
    model = lora(tiny("llama"), target_modules=["q_proj"])
    apart = al.diff(base, model, progress=False).where(role="q_proj").frame["frobenius"].tolist()
    model.merge_adapter()

    merged = al.diff(base, model, progress=False)
    assert pytest.approx(apart, rel=1e-5) == merged.where(role="q_proj").frame["frobenius"].tolist()
    assert {"q_proj"} == set(merged.frame.query("frobenius > 0")["role"])


def test_factors_of_a_tied_output_embedding_are_those_of_a_matrix_of_its_own(tmp_path: Path) -> None:
    """LoRA on an lm_head that base does not store: it moves from the input embedding, which stays."""
    tiny("gemma2").save_pretrained(tmp_path / "base")
    model = lora(tiny("gemma2"), tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    head = model.base_model.model.lm_head  # type: ignore[union-attr, operator]
    expected = float(head.get_delta_weight("default").norm())  # type: ignore[operator, union-attr]

    drift = al.diff(tmp_path / "base", tmp_path / "adapter", progress=False)

    assert {"q_proj", "lm_head"} == set(drift.frame.query("frobenius > 0")["role"])
    assert [pytest.approx(expected, rel=1e-5)] == drift.where(role="lm_head").frame["frobenius"].tolist()
    assert 1 == state(drift, "tied")["sites"]
    complete(drift, tmp_path / "base", tmp_path / "adapter")


def test_an_adapter_that_saved_a_resized_vocabulary(base: Path, tmp_path: Path) -> None:
    """The common rows of embeddings saved whole are compared; the new ones are counted."""
    model = tiny("llama")
    model.resize_token_embeddings(70, mean_resizing=False)  # type: ignore[operator]
    lora(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])

    drift = al.diff(base, tmp_path / "adapter", progress=False)

    rows = drift.frame[drift.frame["role"].isin(["embed_tokens", "lm_head"])]
    assert (2, 2 * 64 * 32, 2 * 70 * 32) == tuple(state(drift, "resized").iloc[:3])
    assert {64 * 32} == set(rows["size"])
    assert rows["targeted"].all()
    complete(drift, base, tmp_path / "adapter")


def test_factors_of_bare_parameters_are_those_of_their_merge(tmp_path: Path) -> None:
    """PEFT does not write down which of a module's parameters they change: the shapes say it."""
    tiny_of("mixtral").float().save_pretrained(tmp_path / "base")
    bare = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    for name, targets in (("both", ["q_proj"]), ("alone", [])):
        model = lora(tiny_of("mixtral").float(), tmp_path / name, target_modules=targets, **bare)

        drift = al.diff(tmp_path / "base", tmp_path / name, progress=False)

        expected = norms(al.diff(tmp_path / "base", model.merge_and_unload(), progress=False))  # type: ignore[operator]
        assert pytest.approx(expected, rel=1e-5, abs=1e-6) == norms(drift)
        complete(drift, tmp_path / "base", tmp_path / name)


@pytest.mark.parametrize("stated", ["x", [1, 2], 3, True, [["q_proj"]]])
def test_patterns_that_are_none_are_a_clear_error(stated: Any, base: Path, tmp_path: Path) -> None:
    """A stranger's config may hold anything."""
    lora(tiny("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": stated}))

    with pytest.raises(CheckpointError, match="adapter: alpha_pattern must map patterns to numbers"):
        al.diff(base, tmp_path / "adapter", progress=False)


OMNI = (
    "base_model.model.thinker.model.layers.",
    "thinker.base_model.model.model.layers.",
    "base_model.model.model.layers.",
)


def test_three_spellings_of_an_omni_adapter_are_one(tmp_path: Path) -> None:
    """Over a thinker alone and over the whole Omni, and never into the talker."""
    thinker = tiny_of("qwen2_5_omni_thinker").float()
    thinker.save_pretrained(tmp_path / "thinker")
    weights = load_file(tmp_path / "thinker" / "model.safetensors")
    config = json.loads((tmp_path / "thinker" / "config.json").read_text())
    omni = tmp_path / "omni"
    omni.mkdir()
    talker = {f"talker.model.layers.{k}.self_attn.q_proj.weight": torch.randn(64, 64) for k in (0, 1)}
    save_file({f"thinker.{name}": t for name, t in weights.items()} | talker, omni / "model.safetensors")
    whole = {"model_type": "qwen2_5_omni", "thinker_config": config, "talker_config": {}}
    (omni / "config.json").write_text(json.dumps(whole))
    shape = weights["model.layers.0.self_attn.q_proj.weight"].shape
    factors = {
        f"{k}.self_attn.q_proj.lora_{side}.weight": torch.randn(size)
        for k in (0, 1)
        for side, size in (("A", (2, shape[1])), ("B", (shape[0], 2)))
    }
    found = []
    for number, prefix in enumerate(OMNI):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(
            {prefix + name: tensor for name, tensor in factors.items()}, folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        for base in ("thinker", "omni"):
            frame = al.diff(tmp_path / base, folder, progress=False).where(targeted=True).frame
            found.append(
                tuple(frame[["tower", "layer", "role", "frobenius"]].itertuples(index=False, name=None))
            )

    assert 1 == len(set(found))
    assert [("language", 0, "q_proj"), ("language", 1, "q_proj")] == [row[:3] for row in found[0]]


# a hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of our own, which huggingface_hub takes for the hub."""
    with serving() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(remote, "BACKOFF", 0.01)

        def tree(_: HfApi, repo_id: str, *args: Any, revision: str, **kwargs: Any) -> Iterator[RepoFile]:
            for name, content in server.repositories[repo_id][revision].files.items():
                yield RepoFile(path=name, size=len(content), oid=git_oid(content))

        monkeypatch.setattr(HfApi, "list_repo_tree", tree)  # which our hub does not speak
        close_session()
        yield server
        close_session()


def shards(weights: dict[str, Tensor]) -> dict[str, bytes]:
    """A repository of two shards: layer 1, and the rest."""
    config = json.dumps(BASE.config.to_dict(), default=str).encode()
    parts = [{n: t for n, t in weights.items() if ("layers.1." in n) == second} for second in (False, True)]
    names = [f"model-0000{k + 1}-of-00002.safetensors" for k in (0, 1)]
    index = {"weight_map": {n: name for name, part in zip(names, parts, strict=True) for n in part}}
    files = {name: save(part) for name, part in zip(names, parts, strict=True)}
    return {"config.json": config, INDEX: json.dumps(index).encode(), **files}


def test_a_shard_that_both_repositories_share_is_not_read(hub: Hub, base: Path) -> None:
    """Nothing beyond its header is fetched: norms are null and drift is zero, unless asked to be exact."""
    half = AFTER | {name: tensor for name, tensor in BEFORE.items() if "layers.1." in name}
    pad = {"zz_big": torch.zeros(400_000)}  # beyond what is fetched with the header
    hub.push("lab/base", shards(BEFORE | {f"model.layers.1.{n}": t for n, t in pad.items()}))
    hub.push("lab/tuned", shards(half | {f"model.layers.1.{n}": t for n, t in pad.items()}))
    shared = "model-00002-of-00002.safetensors"

    quick = al.diff("lab/base", "lab/tuned", progress=False)
    sent = sum(count for name, count in hub.sent.items() if name.endswith(shared))
    exact = al.diff("lab/base", "lab/tuned", detail="exact", progress=False)

    unread = quick.frame["layer"] == 1
    assert sent < 2 * 300_000
    assert quick.frame.loc[unread, "base_norm"].isna().all()
    assert {0.0} == set(quick.frame.loc[unread, "relative"])
    assert quick.frame.loc[~unread, "base_norm"].notna().all()
    assert "10 parameters are in files of equal content on both sides" in " ".join(quick.findings)
    assert exact.frame["base_norm"].notna().all()
    known = al.diff(base, TUNED, progress=False).frame.set_index("parameter")["frobenius"]
    known = known.where(~known.index.str.contains(r"layers\.1\."), 0.0)
    found = exact.frame.set_index("parameter")["frobenius"].drop("model.layers.1.zz_big")
    pd.testing.assert_series_equal(known, found[known.index], rtol=LANES)
    assert pytest.approx(sum(exact.frame["frobenius"] ** 2), rel=1e-9) == sum(quick.frame["frobenius"] ** 2)
    complete(quick, "lab/base", "lab/tuned")


def test_the_groups_of_an_unread_shard_have_ratios_over_what_was_read(hub: Hub) -> None:
    """A role's relative drift is over the sites whose norm is known."""
    hub.push("lab/base", shards(BEFORE))
    hub.push("lab/tuned", shards(AFTER | {n: t for n, t in BEFORE.items() if "layers.1." in n}))

    row = al.diff("lab/base", "lab/tuned", progress=False).by("role").set_index("role").loc["gate_proj"]

    first = float((AFTER[GATE] - BEFORE[GATE]).norm() / BEFORE[GATE].norm())
    assert pytest.approx(first, rel=1e-5) == row["relative"]


def test_two_revisions_of_one_repository(hub: Hub, plain: pd.DataFrame) -> None:
    """`owner/name@revision`, by branch and by commit."""
    files = {"config.json": json.dumps(BASE.config.to_dict(), default=str).encode()}
    commit = hub.push("lab/model", {**files, "model.safetensors": save(BEFORE)})
    hub.push("lab/model", {**files, "model.safetensors": save(AFTER)}, to="tuned")

    drift = al.diff(f"lab/model@{commit}", "lab/model@tuned", progress=False)

    pd.testing.assert_frame_equal(plain, drift.frame)
    assert commit == drift.origin["sources"]["base"]["revision"]


def test_an_adapter_repository_over_a_hub_s_base(hub: Hub, tmp_path: Path, plain: pd.DataFrame) -> None:
    """The adapter is small and downloaded, the base is read where it lies."""
    lora(tiny("llama"), tmp_path / "adapter", target_modules=["gate_proj"])
    expected = norms(al.diff(BASE, tmp_path / "adapter", progress=False))
    files = ("adapter_config.json", "adapter_model.safetensors")
    hub.push("lab/adapter", {name: (tmp_path / "adapter" / name).read_bytes() for name in files})
    hub.push("lab/base", shards(BEFORE))

    drift = al.diff("lab/base", "lab/adapter", progress=False)

    assert pytest.approx(expected, rel=LANES) == norms(drift)
    assert {"gate_proj"} == set(drift.where(targeted=True).frame["role"])


def test_torch_s_files_of_a_repository_are_downloaded(hub: Hub, tmp_path: Path, plain: pd.DataFrame) -> None:
    """They can't be read where they lie; the base beside them is."""
    torch.save({"model": AFTER}, tmp_path / "pytorch_model.bin")
    hub.push("lab/base", shards(BEFORE))
    content = {"config.json": b"{}", "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    hub.push("lab/tuned", content)

    drift = al.diff("lab/base", "lab/tuned", progress=False)

    pd.testing.assert_frame_equal(plain, drift.frame)
    assert "tuned" == drift.origin["sources"]["tuned"]["name"].rpartition("/")[2]


# pairing


def test_the_common_rows_of_a_resized_vocabulary(base: Path, tmp_path: Path) -> None:
    """The words that both sides have are compared, whichever side has more."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    longer = AFTER | {name: torch.cat([BEFORE[name] + 1, torch.full((6, 32), 9.0)]) for name in names}
    tuned = folder_of(tmp_path / "longer", longer)

    for one, two in ((base, tuned), (tuned, base)):
        drift = al.diff(one, two, spectra=2, progress=False)

        rows = drift.frame[drift.frame["parameter"].isin(names)]
        assert [64 * 32] * 2 == rows["size"].tolist()
        assert pytest.approx([math.sqrt(64 * 32)] * 2, rel=LANES) == rows["frobenius"].tolist()
        assert pytest.approx([math.sqrt(64 * 32)] * 2, rel=LANES) == rows["spectral_norm"].tolist()
        assert 2 == state(drift, "resized")["sites"]
        complete(drift, one, two)


def test_not_targeted_is_not_did_not_move(base: Path, tmp_path: Path) -> None:
    """A LoRA whose B is zero could have moved its site; the rest of the model it could not."""
    model = lora(tiny("llama"), target_modules=["q_proj", "gate_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "q_proj" in name:
                parameter.zero_()
    model.save_pretrained(tmp_path / "adapter")

    drift = al.diff(base, tmp_path / "adapter", progress=False)

    assert (2, 2, 17) == tuple(
        state(drift, kind)["sites"] for kind in ("paired", "identical", "not-targeted")
    )
    still = drift.frame.query("targeted and frobenius == 0")
    assert ["q_proj"] * 2 == still["role"].tolist()


def test_a_language_model_that_did_not_move_is_loud_beside_a_tower_that_did(tmp_path: Path) -> None:
    """EmoVIT's case: only vision was tuned."""
    base, tuned = tiny("llava"), nudge(tiny("llava"), "vision_tower")

    drift = al.diff(base, tuned, progress=False)

    assert "The language model did not move at all" in drift.findings[0]
    assert {"vision"} == set(drift.frame.query("frobenius > 0")["tower"])


def test_a_stranger_is_probably_not_the_base() -> None:
    """Relative drift near √2 and a cosine near 0 everywhere are named as such, an adapter's never."""
    drift = al.diff(BASE, tiny("llama", seed=9), progress=False)

    assert "probably not the base" in " ".join(drift.findings)
    assert pytest.approx(math.sqrt(2), rel=0.05) == drift.where(role="gate_proj").frame["relative"].median()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_nothing_paired_is_an_error(kind: str, tmp_path: Path) -> None:
    """Two models without a common matrix, and an adapter to another model."""
    other = tiny_of("bert").float()
    if kind == "adapter":
        lora(tiny("llama"), tmp_path / "adapter", target_modules=["gate_proj"])

    with pytest.raises(NothingToCompare, match="Is this the right base"):
        al.diff(other, tmp_path / "adapter" if kind == "adapter" else TUNED, progress=False)


@pytest.mark.parametrize("order", ["base tied", "tuned tied"])
def test_tied_and_untied(order: str, tmp_path: Path) -> None:
    """An output embedding stored on one side and tied on the other is a row of its own."""
    untied = folder_of(tmp_path / "untied", AFTER, config={"tie_word_embeddings": False})
    left = {name: t for name, t in BEFORE.items() if name != "lm_head.weight"}
    tied = folder_of(tmp_path / "tied", left, config={"tie_word_embeddings": True})
    sides = (tied, untied) if order == "base tied" else (untied, tied)

    drift = al.diff(*sides, progress=False)

    row = state(drift, "tied")
    assert {0, BEFORE["lm_head.weight"].numel()} == {row["base_parameters"], row["tuned_parameters"]}
    assert "tied to the input embedding on one side only" in " ".join(drift.findings)
    complete(drift, *sides)


# oddities


@pytest.mark.parametrize("kind", ["safetensors", "pth", "memory"])
def test_odd_tensors_and_odd_names(kind: str, tmp_path: Path) -> None:
    """Scalars, nothing, flags, whole numbers, names of every sort: each counted once, and shown safely."""
    sides: list[Any] = []
    for name, step in (("base", 0), ("tuned", 1)):
        weights = dict(BEFORE) | {f"x.{k}": v if v.dtype == torch.bool else v + step for k, v in ODD.items()}
        if kind == "safetensors":
            sides.append(folder_of(tmp_path / name, weights))
        elif kind == "pth":
            torch.save(weights, tmp_path / f"{name}.pth")
            sides.append(tmp_path / f"{name}.pth")
        else:
            from affectlens.checkpoints import Checkpoint
            from affectlens.checkpoints.memory import MemoryStore

            sides.append(Checkpoint(MemoryStore(weights)))

    for detail in (None, "heads,neurons,exact"):
        drift = al.diff(*sides, detail=detail, spectra=2, align=True, progress=False)

        rows = drift.frame.set_index("parameter")
        assert len(BEFORE) + len(ODD) == len(drift)
        for name, tensor in ODD.items():
            expected = 0.0 if tensor.dtype == torch.bool else math.sqrt(tensor.numel())
            assert pytest.approx(expected) == rows.loc[f"x.{name}", "frobenius"], name
        complete(drift, *sides)
    assert "<img" not in drift._repr_html_()
    assert "\x1b" not in repr(drift)
    text = drift.save(tmp_path / "drift.csv").read_text("utf-8")
    assert len(drift) == len(al.Drift.load(tmp_path / "drift.csv"))
    assert "\n=" not in text


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]
)
def test_every_dtype_is_compared_by_its_numbers(kind: str, tmp_path: Path) -> None:
    """Whole numbers and small floats drift by what they are."""
    dtype = getattr(torch, kind)
    numbers = torch.arange(4).repeat(3, 1).float()
    base = folder_of(tmp_path / "base", BEFORE | {"z.codes": numbers.to(dtype)})
    tuned = folder_of(tmp_path / "tuned", BEFORE | {"z.codes": (numbers + 1).to(dtype)})

    row = al.diff(base, tuned, progress=False).where(parameter="z.codes").frame.iloc[0]

    assert (kind, math.sqrt(12)) == (row["dtype"], pytest.approx(row["frobenius"]))


def test_a_model_without_values_is_a_clear_error(base: Path) -> None:
    """One that was only outlined on the meta device."""
    with torch.device("meta"):
        outline = tiny("llama")

    with pytest.raises(CheckpointError, match=r"embed_tokens.*is on the meta device"):
        al.diff(base, outline, progress=False)


def test_one_file_on_both_sides(base: Path) -> None:
    """A checkpoint does not drift from itself, however it is named."""
    for same in (base, base / "model.safetensors", al.open_checkpoint(base)):
        drift = al.diff(base, same, progress=False)

        assert 0.0 == drift.frame["frobenius"].max()
        assert {"paired": 0, "identical": 21} == dict(
            zip(drift.ledger["state"], drift.ledger["sites"], strict=True)
        )
        assert drift.frame["base_norm"].gt(0).all()


def test_an_adapter_as_base_is_measured_from_its_effective_weights(base: Path, tmp_path: Path) -> None:
    """From merged LoRA to full checkpoint: Δ is to what the adapter computes."""
    model = lora(tiny("llama"), tmp_path / "adapter", target_modules=["gate_proj"])
    before = al.open_checkpoint(tmp_path / "adapter", base=base)

    drift = al.diff(before, TUNED, progress=False)

    expected = norms(al.diff(model.merge_and_unload(), TUNED, progress=False))
    assert pytest.approx(expected, rel=1e-5, abs=1e-6) == norms(drift)
    complete(drift, before, TUNED)


def test_a_part_of_a_model_is_read_beside_base(base: Path, tmp_path: Path) -> None:
    """A lone `up_proj` is known for what it is by the gate that was not saved."""
    torch.save(
        {"model": {f"module.{n}": t for n, t in AFTER.items() if "up_proj" in n}}, tmp_path / "part.pth"
    )

    drift = al.diff(base, tmp_path / "part.pth", progress=False)

    assert ["up_proj"] * 2 == drift.frame["role"].tolist()
    assert 19 == state(drift, "only-base")["sites"]
    complete(drift, base, tmp_path / "part.pth")
