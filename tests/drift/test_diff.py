"""Diffs of whole checkpoints: the ledger is complete, layouts don't matter, strangers are told."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import affectlens as al
from affectlens.drift.diffing import refuse_unrelated
from affectlens.drift.groups import contrast
from affectlens.errors import NoSuchSite, NothingToCompare, TableError
from tests.numbers import LANES
from tests.small_models import nudge, tiny

COLUMNS = (
    "parameter", "tower", "stack", "layer", "role", "expert", "size", "dtype",
    "frobenius", "base_norm", "relative", "rms", "mean_abs", "max_abs",
    "cosine", "changed", "sign_flips", "nonfinite", "targeted",
)  # fmt: skip


@pytest.fixture(scope="module")
def drift(pair: tuple[Path, Path]) -> al.Drift:
    return al.diff(*pair)


def test_the_columns_are_those_of_the_contract(drift: al.Drift) -> None:
    """Every column that other tools rely on is there."""
    assert [] == [name for name in COLUMNS if name not in drift.frame]


def test_the_ledger_accounts_for_every_parameter(pair: tuple[Path, Path], drift: al.Drift) -> None:
    """Its totals are the numbers of parameters of both sides."""
    base, tuned = (al.open_checkpoint(side).parameters for side in pair)

    assert base == drift.ledger["base_parameters"].sum()
    assert tuned == drift.ledger["tuned_parameters"].sum()


def test_squares_add_up(pair: tuple[Path, Path], drift: al.Drift) -> None:
    """Σ‖Δ‖² over roles is that over the whole model, in float64."""
    base, tuned = (al.open_checkpoint(side) for side in pair)
    whole = sum(float((tuned.read(s).double() - base.read(s).double()).square().sum()) for s in base.sites)

    for group in ("role", "layer", "tower", "tower,role"):
        assert pytest.approx(whole, rel=LANES) == (drift.by(group)["frobenius"] ** 2).sum()


def test_renaming_changes_nothing(pair: tuple[Path, Path], drift: al.Drift, tmp_path: Path) -> None:
    """A checkpoint saved in the layout in memory, behind a wrapper's prefix, gives the same drift."""
    live = al.load(pair[1]).model
    wrapped = {f"module.{name}": tensor.detach().contiguous() for name, tensor in live.named_parameters()}
    save_file(wrapped, tmp_path / "model.safetensors")

    found = al.diff(pair[0], tmp_path)

    pd.testing.assert_frame_equal(drift.frame, found.frame)


def test_a_live_module_can_be_either_side(pair: tuple[Path, Path], drift: al.Drift) -> None:
    """Model in memory or files on disk, the drift is the same."""
    found = al.diff(pair[0], al.load(pair[1]).model)

    pd.testing.assert_frame_equal(drift.frame, found.frame)


def test_parameters_on_one_side_and_of_another_shape_are_in_the_ledger(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """What has no partner of its shape is counted, and never silently dropped."""
    tensors = load_file(pair[0] / "model.safetensors")
    names = sorted(name for name in tensors if "layers.0.self_attn" in name and "language" in name)
    tensors[names[0]] = torch.zeros(3, 3)
    gone = tensors.pop(names[1])
    tensors["language_model.model.extra.weight"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors")

    ledger = al.diff(pair[0], tmp_path).ledger.set_index("state")

    assert (1, 9) == (ledger.loc["reshaped", "sites"], ledger.loc["reshaped", "tuned_parameters"])
    assert gone.numel() == ledger.loc["only-base", "base_parameters"]
    assert 5 == ledger.loc["only-tuned", "tuned_parameters"]


def test_zero_drift_is_a_loud_finding(pair: tuple[Path, Path]) -> None:
    """A language model that did not move is said to be so, and has no moved row in the ledger."""
    drift = al.diff(pair[0], pair[0])

    assert ("The language model did not move at all: its drift is exactly zero.",) == drift.findings
    assert 0 == drift.ledger.set_index("state").loc["paired", "sites"]


def test_strangers_of_one_shape_are_told(save: Callable[..., Path]) -> None:
    """Two models that share nothing but an architecture are probably not base and tuned."""
    drift = al.diff(save(tiny("llama"), "one"), save(tiny("llama", seed=9), "two"))

    assert "probably not the base" in " ".join(drift.findings)
    with pytest.raises(NothingToCompare, match="one is probably not the base of two"):
        refuse_unrelated(drift)


def test_a_delta_in_place_of_weights_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Vicuna was published as a difference: a stranger's norms are near one, a delta's near zero."""
    before, after = (
        {name: tensor for file in side.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for side in pair
    )
    save_file({name: after[name] - before[name] for name in before}, tmp_path / "model.safetensors")

    drift = al.diff(pair[0], tmp_path)

    assert "Tuned looks like a delta" in " ".join(drift.findings)
    assert "apply_delta" in " ".join(drift.findings)
    with pytest.raises(NothingToCompare, match="looks like a delta"):
        refuse_unrelated(drift)


def test_models_without_a_common_matrix_are_an_error(
    pair: tuple[Path, Path], save: Callable[..., Path]
) -> None:
    """Norms that happen to have one width do not make two models kin."""
    from transformers import GPT2Config, GPT2LMHeadModel

    other = save(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)), "gpt2")

    with pytest.raises(NothingToCompare, match="Is this the right base"):
        al.diff(other, pair[1])


def test_control_columns(pair: tuple[Path, Path], save: Callable[..., Path]) -> None:
    """A control's drift stands beside each site's, with the angle between the two changes."""
    control = save(nudge(tiny("llava"), "language_model.layers", scale=0.03), "control")

    frame = al.diff(*pair, control=control).by("role").set_index("role")

    assert (
        pytest.approx(3.0, rel=1e-3)
        == frame.loc["gate_proj", "control_frobenius"] / frame.loc["gate_proj", "frobenius"]
    )


def test_contrast_shows_that_noise_alone_tips_the_relative_norm() -> None:
    """With iid noise of one rms on a gate of half the scale, only the relative norm says 'gate > up'."""
    base = tiny("llama")
    with torch.no_grad():
        for layer in base.model.layers:  # type: ignore[union-attr]
            layer.mlp.gate_proj.weight.mul_(0.5)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    tuned = nudge(tiny("llama"), "nothing")
    tuned.load_state_dict(before)
    nudge(tuned, "mlp", scale=0.01)

    rows = al.diff(base, tuned).contrast("gate_proj", "up_proj").set_index("norm")

    assert pytest.approx(2.0, rel=0.1) == rows.loc["relative", "ratio"]
    assert pytest.approx(2.0, rel=0.1) == rows.loc["relative", "noise_ratio"]
    assert pytest.approx(1.0, rel=0.05) == rows.loc["rms", "ratio"]
    assert 1.0 == rows.loc["rms", "noise_ratio"]


def test_a_control_that_controls_nothing_is_told(pair: tuple[Path, Path], save: Callable[..., Path]) -> None:
    """A stranger, base itself and tuned itself are named for what they are."""
    stranger = al.diff(*pair, control=save(tiny("llava", seed=7), "stranger"))

    assert "probably not a tuning of the same base" in " ".join(stranger.findings)
    with pytest.raises(NothingToCompare, match="the control is probably not a tuning"):
        refuse_unrelated(stranger)
    assert "equals base in every value" in " ".join(al.diff(*pair, control=pair[0]).findings)
    assert "is it the same tuning?" in " ".join(al.diff(*pair, control=pair[1]).findings)


def test_a_nan_is_not_stillness(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One weight that became NaN is named, and the model is not said to have stood still."""
    tensors = load_file(pair[0] / "model.safetensors")
    tensors[next(name for name in tensors if "layers.0.mlp" in name and "language" in name)][0, 0] = float(
        "nan"
    )
    save_file(tensors, tmp_path / "model.safetensors")

    (finding,) = al.diff(pair[0], tmp_path).findings

    assert finding.startswith("1 values are NaN or infinite")


def test_rounding_alone_is_told(save: Callable[..., Path]) -> None:
    """A model saved in bfloat16 differs from itself by rounding; a bfloat16 one saved in float32 does not."""
    model = tiny("llama")
    full, half = save(model, "full"), save(model.bfloat16(), "half")
    again = save(model.float(), "again")

    assert "changed only by rounding to another dtype" in " ".join(al.diff(full, half).findings)
    assert "exactly zero" in " ".join(al.diff(half, again).findings)
    assert 0 == al.diff(half, again).ledger.set_index("state").loc["paired", "sites"]


def test_a_trained_output_embedding_is_not_passed_over(save: Callable[..., Path]) -> None:
    """Tied in base, untied in tuned: the ledger and a finding say that it was not compared."""
    base = save(tiny("gemma2"), "tied")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    untied = base.parent / "untied"
    untied.mkdir()
    save_file(tensors, untied / "model.safetensors")
    (untied / "config.json").write_text('{"tie_word_embeddings": false}', "utf-8")

    drift = al.diff(base, untied)

    assert (
        tensors["lm_head.weight"].numel() == drift.ledger.set_index("state").loc["tied", "tuned_parameters"]
    )
    assert "tied to the input embedding on one side only" in " ".join(drift.findings)


def test_a_control_of_another_shape_spoils_no_ratio(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its relative drift is over the sites it shares, not over all."""
    tensors = load_file(pair[0] / "model.safetensors")
    for name in list(tensors):
        if "mlp.gate_proj" in name and "language" in name:
            tensors[name] = torch.zeros(2, 2) if "layers.0" in name else 2 * tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")

    row = al.diff(*pair, control=tmp_path).by("role").set_index("role").loc["gate_proj"]

    assert pytest.approx(1.0) == row["control_relative"]


def test_a_nan_in_the_control_is_no_matter_of_the_pair(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Base and tuned are measured as without the control."""
    tensors = load_file(pair[0] / "model.safetensors")
    tensors[next(name for name in tensors if "layers.0.mlp" in name and "language" in name)][0, 0] = float(
        "nan"
    )
    save_file(tensors, tmp_path / "model.safetensors")

    without, beside = al.diff(*pair), al.diff(*pair, control=tmp_path)

    pd.testing.assert_frame_equal(without.frame, beside.frame[list(without.frame.columns)])


def test_contrast_counts_each_layer_once() -> None:
    """Experts and shared experts are not layers."""
    frame = al.diff(tiny("llama"), nudge(tiny("llama"), "mlp")).frame
    experts = frame[frame["role"] == "gate_proj"].assign(label="mlp.shared_expert")

    rows = contrast(pd.concat([frame, experts]), first="gate_proj", second="up_proj")

    assert {2} == set(rows["layers"])


def test_small_numbers_keep_their_digits(drift: al.Drift, tmp_path: Path) -> None:
    """JSON holds every digit of a float, however small."""
    frame = drift.frame.assign(rms=1.2345678901234567e-12)
    found = al.Drift.load(al.Drift(frame, drift.origin).save(tmp_path / "drift.json"))

    assert [1.2345678901234567e-12] == list(found.frame["rms"].unique())


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_tables_come_back_as_they_were(suffix: str, drift: al.Drift, tmp_path: Path) -> None:
    """Saved and loaded, a drift has the same sites, numbers, ledger and origin."""
    found = al.Drift.load(drift.save(tmp_path / f"drift{suffix}"))

    assert drift.sites == found.sites
    assert dict(drift.origin) == dict(found.origin)
    np.testing.assert_allclose(drift.frame["relative"], found.frame["relative"], rtol=1e-12)


def test_parquet_is_plain_to_pandas(drift: al.Drift, tmp_path: Path) -> None:
    """Users read it without affectlens."""
    drift.save(tmp_path / "drift.parquet")

    assert len(drift) == len(pd.read_parquet(tmp_path / "drift.parquet"))


@pytest.mark.parametrize("suffix", [".md", ".tex"])
def test_tables_for_papers_have_every_row(suffix: str, drift: al.Drift, tmp_path: Path) -> None:
    """Markdown and LaTeX hold one line a site."""
    text = drift.save(tmp_path / f"drift{suffix}").read_text("utf-8")

    assert len(drift) <= len(text.splitlines())


def test_formulas_in_names_do_not_run_in_a_spreadsheet(drift: al.Drift, tmp_path: Path) -> None:
    """A cell that begins like a formula is quoted."""
    frame = drift.frame.assign(parameter="=cmd()")
    text = al.Drift(frame, drift.origin).save(tmp_path / "drift.csv").read_text("utf-8")

    assert "'=cmd()" in text
    assert "\n=cmd()" not in text


def test_top_sites_feed_an_intervention(drift: al.Drift) -> None:
    """The largest rows of a selection are sites."""
    gates = drift.where(tower="language", role="gate_proj").top(1).sites

    assert ["gate_proj"] == [site.role for site in gates]


def test_wrong_names_are_told(drift: al.Drift) -> None:
    """A wrong column, group, value or suffix names what there is."""
    with pytest.raises(TableError, match="Did you mean 'relative'"):
        drift.top(3, "relativ")
    with pytest.raises(TableError, match="can't aggregate by 'head'"):
        drift.by("head")
    with pytest.raises(NoSuchSite, match="no row has role='gate'"):
        drift.where(role="gate")
    with pytest.raises(TableError, match=r"can't write '.xlsx'"):
        drift.save("drift.xlsx")
