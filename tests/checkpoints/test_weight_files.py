"""A folder without a checkpoint says what it is and what helps; an adapter's folder is read whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import affectlens as al
from affectlens.errors import CheckpointError
from tests.small_models import nudge, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*")

WEIGHTS = {name: tensor.contiguous() for name, tensor in tiny("llama").state_dict().items()}


def weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(WEIGHTS, path)


def empty(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    return make


def sharded(name: str) -> Callable[[Path], None]:
    return lambda folder: dcp.save({"model": WEIGHTS}, checkpoint_id=folder / name, no_dist=True)


def steps(folder: Path) -> None:
    for step in (20, 100, 3):
        weights(folder / f"checkpoint-{step}" / "model.safetensors")


def cached(folder: Path) -> None:
    weights(folder / "snapshots" / ("a" * 40) / "model.safetensors")
    (folder / "blobs").mkdir()


def mlx(folder: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(8, 2)}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}')


# name of the folder → what is in it, below which folder to open it, what the error says
FSDP = "pytorch_model_fsdp_0"
ADAPTER, THINKER = "affect/adapter_model.safetensors", "thinker/model.safetensors"
FOLDERS: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "dcp": (sharded("."), "", ("torch.distributed (DCP)", "format_utils dcp_to_torch", "OUT.pth")),
    "fsdp": (sharded(FSDP), "", ("FSDP", "accelerate merge-weights", f"{FSDP} OUT")),
    "fsdp itself": (sharded(FSDP), FSDP, ("DCP", "dcp_to_torch")),
    "zero": (
        empty("latest", "zero_to_fp32.py", "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "",
        ("DeepSpeed ZeRO", "zero/zero_to_fp32.py", "OUT"),
    ),
    "zero without its script": (
        empty("latest", "global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "",
        ("DeepSpeed ZeRO", "python -m deepspeed.utils.zero_to_fp32"),
    ),
    "megatron": (empty("latest_checkpointed_iteration.txt", "iter_0000010/x.txt"), "", ("Megatron",)),
    "models--me--affect": (cached, "", ("hub's cache", "me/affect", "snapshots")),
    "hub": (lambda folder: cached(folder / "models--me--affect"), "", ("the hub's cache", "me/affect")),
    "trainer": (steps, "", ("a trainer's output folder", "trainer/checkpoint-100")),
    "named adapter": (lambda f: weights(f / ADAPTER), "", ("named adapter/affect",)),
    "pipeline": (lambda f: weights(f / THINKER), "", ("in its folders", "pipeline/thinker")),
    "mlx": (mlx, "", ("MLX", "mlx_lm.fuse", "--dequantize")),
    "mlx file": (mlx, "adapters.safetensors", ("MLX", "mlx_lm.fuse", "--dequantize")),
    "parts": (
        empty("consolidated.00.pth", "consolidated.01.pth", "params.json"),
        "",
        ("2 model-parallel parts", "convert_llama_weights_to_hf.py"),
    ),
    "nothing": (empty("README.md"), "", ("no checkpoint here", "README.md")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_says_what_it_is(case: str, tmp_path: Path) -> None:
    """The error names the form, and what to type."""
    make, below, says = FOLDERS[case]
    folder = tmp_path / case
    folder.mkdir()
    make(folder)

    with pytest.raises(CheckpointError) as caught:
        al.open_checkpoint(folder / below)

    assert [] == [words for words in says if words not in str(caught.value)], str(caught.value)


def test_the_command_for_a_distributed_checkpoint_makes_one_that_can_be_read(tmp_path: Path) -> None:
    """What the error says to type is what works."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    tiny("llama").save_pretrained(tmp_path / "base")
    sharded("dcp")(tmp_path)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "OUT.pth")

    assert 0.0 == al.diff(tmp_path / "base", tmp_path / "OUT.pth", progress=False).frame["frobenius"].max()


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell."""
    weights(tmp_path / "out dir ü" / "model.safetensors")
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))

    assert al.open_checkpoint("~/out dir ü").sites == al.open_checkpoint(tmp_path / "out dir ü").sites


def test_files_beside_a_model_are_named(tmp_path: Path) -> None:
    """They may hold what was trained; a second form of the same weights is none of them."""
    tiny("llama").save_pretrained(tmp_path)
    for name in ("mm_projector.bin", "training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        torch.save({"model.mm_projector.weight": torch.ones(2, 2)}, tmp_path / name)

    notes = al.open_checkpoint(tmp_path).store.notes

    assert ("mm_projector.bin in the same folder: not read",) == notes


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter, with its base beside it."""
    tiny("llava").save_pretrained(tmp_path / "base")
    model = get_peft_model(
        tiny("llava"), LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


TOWER = {
    name: tensor.detach().clone()
    for name, tensor in nudge(tiny("llava"), "vision_tower").named_parameters()
    if "vision_tower" in name
}
PREFIXES = ("base_model.model.", "", "module.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "name", ["non_lora_trainables.bin", "non_lora_state_dict.bin", "vit.safetensors", "anything.pt", "x.pth"]
)
def test_weights_of_any_name_beside_an_adapter_are_read(name: str, prefix: str, adapter: Path) -> None:
    """Their drift is that of the tensors in them."""
    found = {f"{prefix}{key}": value for key, value in TOWER.items()}
    save = save_file if name.endswith("safetensors") else torch.save
    save(found, adapter / name)

    drift = al.diff(adapter.parent / "base", adapter, progress=False)

    expected = al.diff(tiny("llava"), nudge(tiny("llava"), "vision_tower"), progress=False)
    one, two = (side.where(tower="vision").frame["frobenius"].tolist() for side in (drift, expected))
    assert pytest.approx(two, rel=1e-5) == one
    assert drift.where(tower="vision").frame["targeted"].all()
    assert any(f"{name} beside the adapter was read with it" in finding for finding in drift.findings)


def test_what_beside_an_adapter_is_not_read_is_named(adapter: Path) -> None:
    """Broken files, copies, whole models, foreign formats and tensors that fit nothing: none is lost."""
    save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "copy.safetensors")
    save_file(
        {k: v.contiguous() for k, v in tiny("llava").named_parameters()}, adapter / "merged.safetensors"
    )
    (adapter / "broken.bin").write_bytes(b"nothing of torch")
    (adapter / "other.gguf").write_bytes(b"GGUF")
    torch.save({"v_head.summary.weight": torch.ones(1, 8)}, adapter / "value_head.bin")
    torch.save({"state": torch.ones(3)}, adapter / "optimizer.pt")
    for folder in ("second", "checkpoint-20"):
        (adapter / folder).mkdir()
        save_file({"x": torch.ones(3)}, adapter / folder / "adapter_model.safetensors")

    drift = al.diff(adapter.parent / "base", adapter, progress=False)

    told = " ".join(drift.findings)
    for words in (
        "copy.safetensors beside the adapter was not read: it repeats its tensors",
        "merged.safetensors beside the adapter was not read: it holds a whole model",
        "broken.bin beside the adapter was not read",
        "other.gguf beside the adapter can't be read",
        "first: v_head.summary.weight",
        "the folder second beside the adapter holds weights too; they were not read",
    ):
        assert words in told
    assert "optimizer" not in told
    assert "checkpoint-20" not in told
    assert {"gate_proj"} == set(drift.frame.query("frobenius > 0")["role"])


def test_a_broken_file_of_a_trainer_is_an_error(adapter: Path) -> None:
    """Its name says that it holds a part of the tuned model."""
    (adapter / "non_lora_state_dict.bin").write_bytes(b"nothing of torch")

    with pytest.raises(CheckpointError, match="non_lora_state_dict"):
        al.diff(adapter.parent / "base", adapter, progress=False)


def test_an_adapter_without_its_config_says_what_it_lacks(adapter: Path) -> None:
    """Its drift is known up to alpha, and the finding has the command."""
    (adapter / "adapter_config.json").unlink()

    findings = al.diff(adapter.parent / "base", adapter, progress=False).findings

    assert any("it has no adapter_config.json" in one and "hf download" in one for one in findings)
    assert "No file gives LoRA's alpha" in " ".join(findings)


def test_a_config_without_weights_is_an_error(tmp_path: Path) -> None:
    """PEFT's config alone."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))

    with pytest.raises(CheckpointError, match=r"this adapter has no adapter_model.safetensors"):
        al.open_checkpoint(tmp_path)
