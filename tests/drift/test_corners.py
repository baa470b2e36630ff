"""Odd pairs and odd requests: each is measured, counted once, or told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import CheckpointError, TableError
from tests.drift.test_equalities import made
from tests.small_models import nudge, tiny
from tests.tiny_models import tiny as tiny_of


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def written(folder: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture
def base() -> dict[str, Tensor]:
    return weights(tiny("llama"))


@pytest.mark.filterwarnings("ignore:.*")
def test_what_moved_though_not_targeted_is_counted_once(tmp_path: Path) -> None:
    """An adapter as base: where the other has nothing, the first one's change is a drift."""
    root, first, _ = made("lora")
    before = al.open_checkpoint(first, base=root)
    other = get_peft_model(tiny_of("llama").float(), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    other.save_pretrained(tmp_path / "other")

    ledger = al.diff(before, tmp_path / "other", progress=False).ledger

    assert before.parameters == ledger["base_parameters"].sum()


@pytest.mark.filterwarnings("ignore:.*")
def test_own_measures_read_adapters_block_by_block() -> None:
    """Factors tell a function of blocks nothing, so it gets the effective weights."""
    root, adapter, merged = made("lora")
    measures = {"l1": lambda b, t: float((t - b).abs().sum())}

    one, two = (
        al.diff(root, side, measures=measures, progress=False).frame.set_index("parameter")["l1"]
        for side in (merged, adapter)
    )

    assert pytest.approx(one.to_dict(), rel=1e-4, abs=1e-4) == two.to_dict()


def test_own_measures_get_flat_blocks() -> None:
    """Whatever the layout, so that a function of neighbours means one thing."""
    seen: set[int] = set()

    def noted(b: Tensor, t: Tensor) -> float:
        seen.update((b.ndim, t.ndim))
        return 0.0

    al.diff(
        tiny("llama"), nudge(tiny("llama"), "mlp"), measures={"n": noted}, detail="neurons", progress=False
    )

    assert {1} == seen


def test_a_measure_may_not_take_a_column_s_name() -> None:
    """It would overwrite what others rely on."""
    with pytest.raises(TableError, match="can't be called 'frobenius'"):
        al.diff(tiny("llama"), tiny("llama"), measures={"frobenius": lambda b, t: 1.0}, progress=False)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,), ()], ids=str)
def test_tensors_without_width_or_rows(
    shape: tuple[int, ...], base: dict[str, Tensor], tmp_path: Path
) -> None:
    """They hold nothing, or one value, and stop nothing."""
    path = written(tmp_path, "odd", base | {"x": torch.zeros(shape)})

    assert len(base) + 1 == len(al.diff(path, path, progress=False))


def test_complex_values_keep_their_imaginary_part(base: dict[str, Tensor], tmp_path: Path) -> None:
    """A norm is that of both parts."""
    ones = torch.ones(3, 2, dtype=torch.complex64)
    one, two = (written(tmp_path, n, base | {"x.c": v}) for n, v in (("a", ones), ("b", ones + 1j)))

    row = al.diff(one, two, progress=False).where(parameter="x.c").frame.iloc[0]

    assert pytest.approx(np.sqrt(6)) == row["frobenius"]


def test_a_partial_control_is_read_beside_base_and_its_gaps_are_told(tmp_path: Path) -> None:
    """Columns where it has something, a finding for the rest."""
    tuned = nudge(tiny("llama"), "layers")
    part = {f"module.{name}": tensor for name, tensor in weights(tuned).items() if "up_proj" in name}
    torch.save({"model": part}, tmp_path / "c.pth")

    drift = al.diff(tiny("llama"), tuned, control=tmp_path / "c.pth", progress=False)

    assert {"up_proj"} == set(drift.frame.loc[drift.frame["control_frobenius"].notna(), "role"])
    assert "The control lacks" in " ".join(drift.findings)


def test_a_broken_control_is_told(base: dict[str, Tensor], tmp_path: Path) -> None:
    """NaN in the control is not stillness."""
    control = dict(base)
    control["model.layers.0.mlp.gate_proj.weight"] = torch.full_like(
        base["model.layers.0.mlp.gate_proj.weight"], np.nan
    )
    path = written(tmp_path, "control", control)

    drift = al.diff(tiny("llama"), nudge(tiny("llama"), "mlp"), control=path, progress=False)

    assert "values of the control are NaN" in " ".join(drift.findings)


def test_an_output_embedding_that_shares_bytes_is_tied(base: dict[str, Tensor], tmp_path: Path) -> None:
    """A `.pth` says so by its storage, without a config."""
    torch.save(base | {"lm_head.weight": base["model.embed_tokens.weight"]}, tmp_path / "t.pth")

    states = al.diff(tiny("llama"), tmp_path / "t.pth", progress=False).ledger["state"].tolist()

    assert "only-base" not in states


def test_the_norm_behind_an_llm_prefix_pairs(tmp_path: Path) -> None:
    """Emotion-Qwen hangs its language model under `llm.`."""
    tuned = {f"llm.{name}": tensor for name, tensor in weights(nudge(tiny("llama"), "layers")).items()}

    ledger = al.diff(tiny("llama"), written(tmp_path, "llm", tuned), progress=False).ledger

    assert ["paired", "identical"] == ledger["state"].tolist()


def test_heads_that_nothing_counts_are_told(base: dict[str, Tensor], tmp_path: Path) -> None:
    """Without a config their number is not known."""
    drift = al.diff(
        written(tmp_path, "a", base), nudge(tiny("llama"), "layers"), detail="heads", progress=False
    )

    assert "No heads were measured" in " ".join(drift.findings)


def test_a_drift_too_small_to_square_in_float32_is_measured() -> None:
    """1e-24 squared is nothing in float32, and a drift all the same."""
    before, after = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for model, value in ((before, 1e-24), (after, 3e-24)):
            model.model.layers[0].mlp.gate_proj.weight.fill_(value)  # type: ignore[union-attr, index]

    drift = al.diff(before, after, progress=False)

    row = drift.where(layer=0, role="gate_proj").frame.iloc[0]
    assert pytest.approx(2e-24 * np.sqrt(row["size"]), rel=1e-5) == row["frobenius"]
    assert () == drift.findings


@pytest.mark.filterwarnings("ignore:.*")
def test_what_a_config_says_of_alpha_is_kept() -> None:
    """alpha= is for files that say none; a finding says that it was not used."""
    root, adapter, _ = made("lora")

    plain, asked = (al.diff(root, adapter, alpha=alpha, progress=False) for alpha in (None, 99))

    assert plain.frame["frobenius"].tolist() == asked.frame["frobenius"].tolist()
    assert "alpha=99 was not used" in " ".join(asked.findings)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_variant_of_lora_is_refused(tmp_path: Path) -> None:
    """A tensor beside A and B means a change that is not their product."""
    root, adapter, _ = made("lora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors)).rsplit(".lora_", 1)[0] + ".lora_diag.weight"
    folder = tmp_path / "variant"
    folder.mkdir()
    save_file(tensors | {name: torch.ones(4)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())

    with pytest.raises(CheckpointError, match="variant of LoRA"):
        al.diff(root, folder, progress=False)
