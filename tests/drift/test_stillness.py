"""A language model that was not compared is never said not to have moved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import affectlens as al
from affectlens.errors import NothingToCompare
from affectlens.views.sentences.about_drift import about_drift
from tests.small_models import nudge, tiny

WEIGHTS = {name: tensor.detach().clone() for name, tensor in tiny("llama").named_parameters()}
TUNED = {name: tensor.detach().clone() for name, tensor in nudge(tiny("llama"), "proj").named_parameters()}
Parts = Callable[[Tensor], dict[str, Tensor]]


def words(out: int, into: int) -> Tensor:
    return torch.full((out, into), 7, dtype=torch.int32)


def bytes_(out: int, into: int, kind: torch.dtype = torch.uint8) -> Tensor:
    return torch.full((out, into), 7).to(kind)


def numbers(weight: Tensor, kind: torch.dtype) -> Tensor:
    return (weight / weight.abs().max() * 100).to(kind)


# The tensors that a quantiser writes in place of a matrix of (out, in).
LAYOUTS: dict[str, Parts] = {
    "AWQ": lambda w: {
        "qweight": words(w.shape[1], w.shape[0] // 8), "qzeros": words(1, w.shape[0] // 8),
        "scales": torch.ones(1, w.shape[0]).half(),
    },
    "GPTQ": lambda w: {
        "qweight": words(w.shape[1] // 8, w.shape[0]), "qzeros": words(1, w.shape[0] // 8),
        "scales": torch.ones(1, w.shape[0]).half(), "g_idx": torch.zeros(w.shape[1], dtype=torch.int32),
    },
    "EETQ": lambda w: {
        "weight": bytes_(w.shape[1], w.shape[0], torch.int8), "weight_scales": torch.ones(w.shape[0]).half(),
    },
    "EETQ of its shape": lambda w: {
        "weight": numbers(w, torch.int8), "weight_scales": torch.ones(w.shape[0]).half(),
    },
    "EXL2": lambda w: {
        "q_weight": words(w.shape[1] // 8, w.shape[0]), "q_scale": words(1, w.shape[0] // 8),
        "q_scale_max": torch.ones(1).half(), "q_groups": torch.zeros(2, dtype=torch.int16),
        "q_invperm": torch.zeros(w.shape[1], dtype=torch.int32),
    },
    "EXL3": lambda w: {
        "trellis": torch.zeros(2, 2, 16, dtype=torch.int16), "suh": torch.ones(w.shape[1]).half(),
        "svh": torch.ones(w.shape[0]).half(),
    },
    "HQQ": lambda w: {
        "W_q": bytes_(w.shape[0] // 2, w.shape[1]), "scale": torch.ones(w.shape[0], 1), "zero": torch.ones(1),
    },
    "BitNet": lambda w: {"weight": bytes_(w.shape[0] // 4, w.shape[1]), "weight_scale": torch.ones(1)},
    "MLX": lambda w: {
        "weight": words(w.shape[0], w.shape[1] // 8).view(torch.uint32), "scales": torch.ones(w.shape[0], 1),
        "biases": torch.ones(w.shape[0], 1),
    },
    "QuIP#": lambda w: {"Qidxs": words(w.shape[0], w.shape[1] // 8), "SU": torch.ones(1)},
    "VPTQ": lambda w: {"centroids": torch.ones(1, 1, 8), "indices": words(1, 8)},
    "an unknown one": lambda w: {"packed_codes": words(w.shape[0], w.shape[1] // 8), "book": torch.ones(4)},
    "int8 alone": lambda w: {"weight": numbers(w, torch.int8)},
    "uint8 alone": lambda w: {"weight": numbers(w + w.abs().max(), torch.uint8)},
    "int32 alone": lambda w: {"weight": numbers(w, torch.int32)},
    "int8, unknown scales": lambda w: {"weight": numbers(w, torch.int8), "step_size": torch.ones(w.shape[0])},
    "fp8 alone": lambda w: {"weight": numbers(w, torch.float8_e4m3fn)},
    "fp8 e5m2 alone": lambda w: {"weight": numbers(w, torch.float8_e5m2)},
    "fp8, unknown scales": lambda w: {"weight": numbers(w, torch.float8_e4m3fn), "s": torch.ones(1)},
}  # fmt: skip


def folder_of(path: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    known = tiny("llama").config.to_dict()  # type: ignore[union-attr, operator]
    (path / "config.json").write_text(json.dumps({**known, **config}, default=str))
    return path


def packed(layout: str, *, only: str = "proj") -> dict[str, Tensor]:
    found = {}
    for name, weight in WEIGHTS.items():
        if only in name and "proj" in name:
            module = name.removesuffix(".weight")
            found |= {f"{module}.{leaf}": part for leaf, part in LAYOUTS[layout](TUNED[name]).items()}
        else:
            found[name] = weight
    return found


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "silent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_language_model_is_not_said_not_to_have_moved(
    layout: str, stated: bool, tmp_path: Path
) -> None:
    """Whoever packed it, and whether the config says so: its matrices are no rows, as the headline says."""
    config = {"quantization_config": {"quant_method": layout.lower()}} if stated else {}
    base, tuned = (
        folder_of(tmp_path / "base", WEIGHTS),
        folder_of(tmp_path / "tuned", packed(layout), **config),
    )

    drift = al.diff(base, tuned, progress=False)

    assert {"embed_tokens", "lm_head", "norm"} == set(drift.frame["role"])
    assert drift.findings[0].startswith("No matrix of the language model was compared")
    assert not any("did not move at all" in finding for finding in drift.findings)
    one, two = (al.open_checkpoint(side).parameters for side in (base, tuned))
    assert one == drift.ledger["base_parameters"].sum()
    assert two == drift.ledger["tuned_parameters"].sum()


def test_a_part_that_was_not_compared_limits_the_headline(tmp_path: Path) -> None:
    """The matrices that were compared did not move, and the others are counted."""
    base = folder_of(tmp_path / "base", WEIGHTS)
    tuned = folder_of(tmp_path / "tuned", packed("int8 alone", only="mlp"))

    drift = al.diff(base, tuned, progress=False)

    assert drift.findings[0].startswith(
        "The 8 compared matrices of the language model did not move at all; others"
    )
    assert "is not known" in drift.findings[0]
    assert "The compared attention and feed-forward weights" in str(about_drift(drift))


def test_a_model_packed_whole_is_an_error(tmp_path: Path) -> None:
    """Without a matrix there is nothing to compare; the error names the packing."""
    left = {
        name: tensor for name, tensor in packed("AWQ").items() if "embed" not in name and "head" not in name
    }
    base, tuned = folder_of(tmp_path / "base", WEIGHTS), folder_of(tmp_path / "tuned", left)

    with pytest.raises(NothingToCompare, match="packed by AWQ or GPTQ"):
        al.diff(base, tuned, progress=False)


def test_matrices_without_elements_are_none(tmp_path: Path) -> None:
    """Equal shapes of nothing make no pair."""
    nothing = {name: torch.zeros(0, *tensor.shape[1:]) for name, tensor in WEIGHTS.items()}
    base, tuned = folder_of(tmp_path / "base", nothing), folder_of(tmp_path / "tuned", nothing)

    with pytest.raises(NothingToCompare):
        al.diff(base, tuned, progress=False)
