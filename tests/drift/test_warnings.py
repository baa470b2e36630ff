"""What continues with a warning: each is told in a finding, and the ledger accounts for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import affectlens as al

Tensors = dict[str, Tensor]
GATE = "model.layers.0.mlp.gate_proj.weight"
CONFIG = {"model_type": "llama", "num_attention_heads": 2}


def model(*, layers: int = 2) -> Tensors:
    """A gated MLP in each layer."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"gate": (8, 4), "up": (8, 4), "down": (4, 8)}
    found = {"model.embed_tokens.weight": torch.randn(16, 4, generator=draw)}
    return found | {
        f"model.layers.{layer}.mlp.{role}_proj.weight": torch.randn(shape, generator=draw)
        for layer in range(layers)
        for role, shape in shapes.items()
    }


def drifted(folder: Path, base: Tensors, tuned: Tensors, **settings: Any) -> al.Drift:
    """Save two models, the second with these settings, and compare them."""
    for name, tensors, config in (("base", base, CONFIG), ("tuned", tuned, {**CONFIG, **settings})):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    return al.diff(folder / "base", folder / "tuned", progress=False)


def test_numbers_of_layers_that_differ_are_told(tmp_path: Path) -> None:
    """By tower, and the lone parameters beside."""
    drift = drifted(tmp_path, model(), model(layers=3))

    assert "language has 2 layers in base and 3 in tuned." in drift.findings
    assert [0, 7, 3] == drift.ledger["sites"].tolist()
    assert ["paired", "identical", "only-tuned"] == drift.ledger["state"].tolist()


def test_dtypes_that_differ_are_told(tmp_path: Path) -> None:
    """With the first of them."""
    tuned = {**model(), GATE: (model()[GATE] + 1).bfloat16()}

    assert (
        f"1 compared parameters have another dtype on the two sides (first: {GATE}, float32 → bfloat16)."
        in drifted(tmp_path, model(), tuned).findings
    )


@pytest.mark.parametrize("shape", [(8, 1), (32,), (1, 8, 4), (4, 8), (0, 4), ()])
def test_a_parameter_of_another_shape_is_accounted_for_once(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Also where its shape makes it something else, so that each side has a site of its own."""
    base, tuned = model(), {**model(), GATE: torch.ones(shape)}
    drift = drifted(tmp_path, base, tuned)
    ledger = drift.ledger.set_index("state")

    assert [1, 32, tuned[GATE].numel()] == ledger.loc["reshaped"].tolist()[:3]
    assert not {"only-base", "only-tuned"} & set(ledger.index)
    assert f"1 parameters have another shape (first: {GATE})." in drift.findings
    assert sum(map(Tensor.numel, base.values())) == ledger["base_parameters"].sum()
    assert sum(map(Tensor.numel, tuned.values())) == ledger["tuned_parameters"].sum()


def test_a_side_of_zeros_is_told(tmp_path: Path) -> None:
    """Weights that were lost on the way."""
    found = drifted(tmp_path, model(), {**model(), GATE: torch.zeros(8, 4)}).findings

    assert f"1 weights of tuned are all zeros, unlike on the other side (first: {GATE})." in found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "new"}, "tuned: its model_type 'new' is unknown: parameters are recognised by"),
        ({"model_type": 7}, "tuned: its model_type is not a name: parameters are recognised by"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "tuned: the model runs remote code, which is not executed here"),
        ({"quantization_config": [1]}, "tuned: the weights are quantized"),
    ],
)
def test_what_is_odd_about_a_model_is_told(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    """ControlField the values, since it bears on what the parameters mean."""
    assert any(words in finding for finding in drifted(tmp_path, model(), model(), **settings).findings)


def test_what_is_odd_about_both_is_told_once(tmp_path: Path) -> None:
    """In one sentence."""
    folders = [tmp_path / "base", tmp_path / "tuned"]
    drifted(tmp_path, model(), model())
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({"model_type": "new"}))

    found = [words for words in al.diff(*folders, progress=False).findings if "'new'" in words]

    assert 1 == len(found)
    assert found[0].startswith("base and tuned: ")


@pytest.mark.parametrize("sides", [(torch.complex64, torch.complex64), (torch.float32, torch.complex64)])
def test_complex_numbers_are_measured(tmp_path: Path, sides: tuple[torch.dtype, torch.dtype]) -> None:
    """Also where one side has none, and head by head."""
    base, tuned = ({name: value.to(dtype) for name, value in model().items()} for dtype in sides)
    tuned[GATE] = tuned[GATE] + 3j
    drifted(tmp_path, base, tuned)

    drift = al.diff(
        tmp_path / "base", tmp_path / "tuned", detail="neurons", spectra=1, align=True, progress=False
    )
    row = drift.where(parameter=GATE).frame.iloc[0]

    assert 3 * 32**0.5 == pytest.approx(row["frobenius"])
    assert 3 * 4**0.5 == pytest.approx(drift.neurons(GATE)["frobenius"].iloc[0])
