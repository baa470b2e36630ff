"""PEFT loads an exported adapter over the base with the same logits, whatever form it had before."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import affectlens as al
from affectlens.checkpoints.folders import RECORD
from affectlens.errors import CheckpointError, WriteError
from affectlens.writing import export, merge, read_record
from tests.checkpoints.adapters.test_adapter import KINDS, adapted
from tests.numbers import differ

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 15)[None]
# Changes that are none of a module's two factors: an export leaves them out, a merge does not.
BESIDE = [kind for kind in KINDS if kind.startswith(("bias", "rows", "parameters", "experts"))]
TEXT = [kind for kind in KINDS if not kind.startswith("vision") and kind not in BESIDE]

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # PEFT has much to say of each kind

Saved = Callable[[str], tuple[Path, Path, nn.Module]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Folders of a base and of an adapter of a kind, and the adapted model."""
    found: dict[str, tuple[Path, Path, nn.Module]] = {}

    def make(kind: str) -> tuple[Path, Path, nn.Module]:
        if kind not in found:
            folder = tmp_path_factory.mktemp("adapter")
            base, model = adapted(kind)
            base.save_pretrained(folder / "base")
            model.save_pretrained(folder / "adapter")
            found[kind] = folder / "base", folder / "adapter", model
        return found[kind]

    return make


@pytest.fixture
def trainables(saved: Saved, tmp_path: Path) -> tuple[Path, Path, nn.Module]:
    """The base, and a .pth as AffectGPT's code saves one: factors, a projector, an optimizer."""
    base, adapter, model = saved("lora")
    kept = {
        f"llama_{name.replace('base_model', 'model.base_model', 1)}".replace(
            ".weight", ".default.weight"
        ): tensor
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    kept["affectgpt_proj.weight"] = torch.ones(64, 8)
    envelope = {"model": kept, "optimizer": {"state": {0: torch.ones(3)}}, "epoch": 60}
    torch.save(envelope, tmp_path / "checkpoint_000060.pth")
    return base, tmp_path / "checkpoint_000060.pth", model


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def fresh(base: Path, model: nn.Module) -> Any:
    kind: Any = type(model.get_base_model())  # type: ignore[operator]
    return kind.from_pretrained(base)


@pytest.mark.parametrize("kind", TEXT)
def test_peft_loads_what_was_exported(kind: str, saved: Saved, tmp_path: Path) -> None:
    """The export's logits equal the adapted model's to the bit, the merge's up to rounding."""
    base, adapter, model = saved(kind)
    export(adapter, base, out=tmp_path / "out")
    merge(adapter, base, out=tmp_path / "merged")

    loaded = peft.PeftModel.from_pretrained(fresh(base, model), tmp_path / "out")

    assert torch.equal(logits(model), logits(loaded))
    assert differ(logits(model), logits(fresh(base, model)))
    torch.testing.assert_close(logits(model), logits(fresh(tmp_path / "merged", model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [kind for kind in BESIDE if "linear" not in kind and "end to end" not in kind]
)
def test_what_an_export_leaves_out_is_named_and_merged(kind: str, saved: Saved, tmp_path: Path) -> None:
    """Biases of B, rows of tokens, factors of experts: the merged model has them, the export says why not."""
    base, adapter, model = saved(kind)
    try:
        left_out = export(adapter, base, out=tmp_path / "out")["left_out"]
    except CheckpointError as error:
        left_out = {"all": str(error)}
        assert "--merged" in left_out["all"]
    merge(adapter, base, out=tmp_path / "merged")

    assert left_out
    torch.testing.assert_close(logits(model), logits(fresh(tmp_path / "merged", model)), rtol=1e-4, atol=1e-5)


def test_convolutions_and_towers_go_along(saved: Saved, tmp_path: Path) -> None:
    """Every tensor of an adapter of a vision tower reaches its module."""
    base, adapter, model = saved("vision and convolution")
    found = export(adapter, base, out=tmp_path / "out")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(fresh(base, model), tmp_path / "out")

    assert {} == found["left_out"]
    assert [] == [str(one.message) for one in told if "missing" in str(one.message).lower()]
    expected, state = model.state_dict(), loaded.state_dict()
    assert expected.keys() == state.keys()
    assert [] == [name for name, tensor in expected.items() if not torch.equal(tensor, state[name])]


def test_trainables_become_an_adapter(trainables: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    """Alpha comes from the caller; tensors without a place in the base are listed with the reason."""
    base, source, model = trainables
    found = export(source, base, out=tmp_path / "out", alpha=6.0)

    loaded = peft.PeftModel.from_pretrained(fresh(base, model), tmp_path / "out")
    assert torch.equal(logits(model), logits(loaded))
    assert {"affectgpt_proj.weight": "the base has no such parameter"} == found["left_out"]
    assert found == read_record(tmp_path / "out")
    merged = merge(source, base, out=tmp_path / "merged", alpha=6.0)
    assert (
        0
        == al.diff(al.open_checkpoint(source, base=base, alpha=6.0), merged, progress=False)
        .frame["frobenius"]
        .sum()
    )
    told = " ".join(read_record(tmp_path / "merged")["not_carried_over"][source.name])
    assert "are stored in tuned alone (first: affectgpt_proj.weight)" in told


def test_the_config_names_each_module(saved: Saved, tmp_path: Path) -> None:
    """It has each module's rank and alpha, targets that match these modules alone, and the base's name."""
    base, adapter, _ = saved("patterns")
    export(adapter, base, out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = [name for name, _ in fresh(base, saved("patterns")[2]).named_modules()]
    stated = {name.removeprefix("base_model.model.").partition(".lora_")[0]
              for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}  # fmt: skip

    settings = peft.LoraConfig(r=1, target_modules=config["target_modules"])
    assert stated == {n for n in names if peft.tuners.tuners_utils.check_target_module_exists(settings, n)}
    assert (4, 6, str(base)) == (config["r"], config["lora_alpha"], config["base_model_name_or_path"])
    assert {2, 3} == set(config["rank_pattern"].values())
    assert {5, 7} == set(config["alpha_pattern"].values())
    assert al.open_checkpoint(tmp_path / "out", base=base).factors.keys() == (
        al.open_checkpoint(adapter, base=base).factors.keys()
    )


def test_a_known_source_has_its_preset(trainables: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    """The preset checks the rank: these factors have 4, AffectGPT's have 16."""
    base, source, _ = trainables
    with pytest.raises(CheckpointError, match="rank 4, but its config or the preset says 16"):
        export(source, base, out=tmp_path / "out", preset="affectgpt")

    assert not (tmp_path / "out").exists()


def test_what_peft_would_get_wrong_is_left_out(saved: Saved, tmp_path: Path) -> None:
    """Whole tensors of adapted modules, of other shapes, and the base's own copies are left out."""
    base, adapter, _ = saved("embedding")
    found = export(adapter, base, out=tmp_path / "0")
    assert ["the base's own copy of an adapted weight"] == list(found["left_out"].values())

    changed = shutil.copytree(saved("lora")[1], tmp_path / "adapter")
    tensors = load_file(changed / "adapter_model.safetensors")
    head = "base_model.model.model"
    tensors[f"{head}.layers.0.self_attn.q_proj.weight"] = torch.ones(64, 64)
    tensors[f"{head}.embed_tokens.weight"] = torch.ones(300, 64)
    tensors[f"{head}.norm.weight"] = torch.ones(64)
    save_file(tensors, changed / "adapter_model.safetensors")
    found = export(changed, saved("lora")[0], out=tmp_path / "1")
    assert {
        f"{head}.layers.0.self_attn.q_proj.weight": (
            "its module has factors too, and PEFT either saves a module whole or adapts it"
        ),
        f"{head}.embed_tokens.weight": "its shape in the base differs",
    } == found["left_out"]
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert ["model.norm"] == config["modules_to_save"]


def test_what_is_no_adapter_is_refused(
    saved: Saved, trainables: tuple[Path, Path, nn.Module], tmp_path: Path
) -> None:
    """No factors, no alpha, DoRA beside LoRA, a folder in use: each is refused and nothing is written."""
    base, adapter, _ = saved("dora")
    mixed = shutil.copytree(adapter, tmp_path / "mixed")
    tensors = load_file(mixed / "adapter_model.safetensors")
    name = next(name for name in tensors if "magnitude" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, mixed / "adapter_model.safetensors")
    config = json.loads((mixed / "adapter_config.json").read_text())
    (mixed / "adapter_config.json").write_text(json.dumps({**config, "use_dora": None}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("kept")
    cases: tuple[tuple[Path, str, type[Exception], str], ...] = (
        (base, "out", CheckpointError, "holds no LoRA factors"),
        (trainables[1], "out", CheckpointError, "no file says alpha"),
        (mixed, "out", CheckpointError, "only some of its modules are DoRA's"),
        (adapter, "taken", WriteError, "the folder is not empty"),
    )
    for source, out, expected, words in cases:
        with pytest.raises(expected, match=words):
            export(source, base, out=tmp_path / out)
    assert not (tmp_path / "out").exists()
    assert ["file"] == [path.name for path in (tmp_path / "taken").iterdir()]


def test_the_record_of_an_export_says_what_it_is(saved: Saved, tmp_path: Path) -> None:
    """It has the sources by their hashes and the counts, and no path."""
    base, adapter, _ = saved("saved whole")
    found = export(adapter, base, out=tmp_path / "out")
    text = (tmp_path / "out" / RECORD).read_text()

    assert al.open_checkpoint(base).identity == found["base"]
    assert "adapter" == found["source"]["name"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    size = sum(tensor.numel() for tensor in tensors)
    assert {"modules": 2, "parameters": size, "saved_whole": 3} == found["adapter"]
    assert str(tmp_path.parent) not in text
    assert str(base.parent) not in text


def test_a_pattern_means_one_module() -> None:
    """It matches no module whose name ends alike, nor one with another letter in place of a dot."""
    from peft.utils.other import get_pattern_key

    from affectlens.writing.export import _exactly

    modules = ("model.layers.1.mlp.up_proj", "other.model.layers.1.mlp.up_proj", "modelXlayers.1.mlp.up_proj")
    for module in modules:
        pattern = _exactly(module)
        assert [module] == [one for one in modules if get_pattern_key([pattern], one) == pattern]
