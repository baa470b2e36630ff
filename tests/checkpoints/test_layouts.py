"""A live model and its files in both layouts have the same sites and the same values, to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import affectlens as al
from affectlens.checkpoints.memory import from_module
from tests.tiny_models import tiny

# One of each way to store: plain, fused, by head, interleaved, turned, stacked, split, renamed.
KINDS = (
    "phi3", "gpt2", "mixtral", "qwen3_next", "falcon", "t5", "llava", "gpt_oss", "deepseek_v3", "modernbert",
    "jetmoe", "qwen2_5_vl", "qwen3_vl_moe", "whisper", "bloom", "qwen2_audio", "dinov2",
)  # fmt: skip


def test_a_part_in_the_other_layout_is_read_beside_its_base(tmp_path: Path) -> None:
    """Stacked experts saved alone pair with a base that stores each expert."""
    model = tiny("mixtral")
    model.save_pretrained(tmp_path)
    part = {name: t.detach() for name, t in model.state_dict().items() if name.endswith("experts.down_proj")}
    save_file(part, tmp_path / "part.safetensors")

    drift = al.diff(tmp_path / "model.safetensors", tmp_path / "part.safetensors")

    assert {"down_proj"} == set(drift.frame["role"])
    assert 0 == drift.frame["frobenius"].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_sites_and_values_are_the_same_in_every_layout(kind: str, tmp_path: Path) -> None:
    """Tensors that a file fuses, stacks, transposes or renames read as in the live module."""
    model = tiny(kind)
    model.save_pretrained(tmp_path / "original")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)

    live = from_module(model)

    for layout in ("original", "memory"):
        stored = al.open_checkpoint(tmp_path / layout)
        assert live.sites == stored.sites, layout
        assert [] == [site for site in live.sites if not torch.equal(live.read(site), stored.read(site))]
