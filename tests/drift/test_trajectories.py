"""Trajectories: steps add up, a straight way has one direction, and every finding names its step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.drift.trajectories import Trajectory, trajectory
from affectlens.errors import TableError
from tests.numbers import LANES
from tests.small_models import nudge, tiny

COLUMNS = (
    "step", "name", "parameter", "tower", "stack", "layer", "role", "expert", "param", "label", "size",
    "targeted", "frobenius", "base_norm", "relative", "rms", "cosine",
    "step_frobenius", "step_base_norm", "step_relative", "final_frobenius", "along",
)  # fmt: skip


@pytest.fixture(scope="module")
def ladder(save: Callable[..., Path]) -> list[Path]:
    """Base; its MLPs nudged; nudged on as far again in the same direction."""
    once = nudge(tiny("llama"), "mlp")
    with torch.no_grad():
        twice = tiny("llama")
        for parameter, one in zip(twice.parameters(), once.parameters(), strict=True):
            parameter += 2 * (one - parameter)
    return [save(model, name) for model, name in ((tiny("llama"), "base"), (once, "sft"), (twice, "rl"))]


@pytest.fixture(scope="module")
def way(ladder: list[Path]) -> Trajectory:
    return trajectory(ladder, progress=False)


def test_one_row_a_step_and_site(ladder: list[Path], way: Trajectory) -> None:
    """The columns are those that are documented, the start has no rows of its own."""
    sites = len(al.open_checkpoint(ladder[0]).sites)

    assert list(COLUMNS) == list(way.frame)
    assert {1: sites, 2: sites} == way.frame["step"].value_counts().to_dict()
    assert ["sft", "rl"] == list(way.frame["name"].unique())


def test_more_of_the_same_lies_along_one_direction(way: Trajectory) -> None:
    """Step 2 goes on as step 1 began: cosine 1 with the whole way, half of it by then."""
    moved = way.frame[way.frame["frobenius"] > 0]
    first, second = (moved[moved["step"] == step] for step in (1, 2))

    assert {"gate_proj", "up_proj", "down_proj"} == set(moved["role"])
    np.testing.assert_allclose(moved["along"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(2 * first["frobenius"].to_numpy(), second["frobenius"], rtol=1e-5)
    np.testing.assert_allclose(first["step_frobenius"].to_numpy(), second["step_frobenius"], rtol=1e-5)
    np.testing.assert_allclose(first["final_frobenius"].to_numpy(), second["frobenius"], rtol=LANES)


def test_what_stands_still_has_no_direction(way: Trajectory) -> None:
    """Where a change is zero there is no angle with it."""
    still = way.frame[way.frame["frobenius"] == 0]

    assert len(still)
    assert still["along"].isna().all()


def test_each_step_is_the_diff_of_its_checkpoints(ladder: list[Path], way: Trajectory) -> None:
    """From the start and from the step before, the figures are those of `diff`."""
    last = way.frame[way.frame["step"] == 2].reset_index(drop=True)
    whole = al.diff(ladder[0], ladder[2]).frame
    part = al.diff(ladder[1], ladder[2]).frame

    for name in ("frobenius", "base_norm", "relative", "rms", "cosine", "size"):
        np.testing.assert_array_equal(whole[name], last[name])
    for name in ("frobenius", "base_norm", "relative"):
        np.testing.assert_array_equal(part[name], last[f"step_{name}"])


def test_a_way_that_turns_has_an_angle(save: Callable[..., Path]) -> None:
    """Δ_1 and Δ_2 of one length at right angles: cosine 0, and a step of √2 between them, by hand."""
    corners = []
    for name, row in (("start", None), ("one", 0), ("two", 1)):
        model = tiny("llama")
        if row is not None:
            with torch.no_grad():
                _weight(model)[row] += 1.0
        corners.append(save(model, name))

    found = trajectory(corners, progress=False).where(role="gate_proj", layer=0).frame

    assert pytest.approx([0.0, 1.0], abs=1e-6) == list(found["along"])
    assert pytest.approx([np.sqrt(32), np.sqrt(2 * 32)], rel=1e-5) == list(found["step_frobenius"])


def _weight(model: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    return weight


@pytest.mark.parametrize("group", ["role", "step,role", "layer", "tower, role"])
def test_squares_add_up_within_each_step(group: str, way: Trajectory) -> None:
    """Σ‖Δ‖² over groups is that of the step, whatever the groups, and steps are never added."""
    whole, parts = way.by("step").set_index("step"), way.by(group)
    assert list(parts)[:2] == ["step", "name"]

    for name in ("frobenius", "step_frobenius", "base_norm", "final_frobenius"):
        sums = (parts[name] ** 2).groupby(parts["step"]).sum()
        np.testing.assert_allclose(whole[name] ** 2, sums, rtol=1e-12)


def test_the_angle_of_a_group_is_that_of_its_whole_change(save: Callable[..., Path]) -> None:
    """It is worked out from inner products, as on the tensors laid end to end."""
    models = [tiny("llama"), nudge(tiny("llama"), "mlp"), nudge(tiny("llama"), "mlp", seed=2, scale=0.02)]
    with torch.no_grad():
        for last, middle, first in zip(*(m.parameters() for m in reversed(models)), strict=True):
            last += 0.5 * (middle - first)
    flat = [torch.cat([p.detach().double().flatten() for p in model.parameters()]) for model in models]
    expected = torch.cosine_similarity(flat[1] - flat[0], flat[2] - flat[0], dim=0)

    found = trajectory([save(model, f"epoch{i}") for i, model in enumerate(models)], progress=False)

    assert pytest.approx(float(expected), rel=1e-5) == found.by("step")["along"][0]


def test_two_checkpoints_are_one_step(ladder: list[Path]) -> None:
    """The step from the start is the whole way."""
    frame = trajectory(ladder[:2], progress=False).frame

    assert {1} == set(frame["step"])
    np.testing.assert_array_equal(frame["frobenius"], frame["step_frobenius"])


def test_findings_name_their_step(ladder: list[Path]) -> None:
    """A step that did nothing is told, once, and the last checkpoint is never called a control."""
    base, once, _ = ladder
    findings = trajectory([base, base, once, once], progress=False).findings

    still = "The language model did not move at all: its drift is exactly zero."

    assert (f"Step 1 (base): {still}", f"Step 3 (sft), from the step before: {still}") == findings


def test_strangers_are_told(ladder: list[Path], save: Callable[..., Path]) -> None:
    """A step of another model is no step of this tuning."""
    stranger = save(tiny("llama", seed=9), "stranger")

    findings = trajectory([*ladder[:2], stranger], progress=False).findings

    assert any(f.startswith("Step 2 (stranger): This is probably not the base") for f in findings)
    assert not any(f.startswith("Step 1") for f in findings)


def test_the_ledger_accounts_for_every_step(ladder: list[Path], way: Trajectory) -> None:
    """Its totals are the start's parameters, once a step."""
    start = al.open_checkpoint(ladder[0]).parameters

    assert {1: start, 2: start} == way.ledger.groupby("step")["base_parameters"].sum().to_dict()


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_trajectories_come_back_as_they_were(suffix: str, way: Trajectory, tmp_path: Path) -> None:
    """Saved and loaded, they have the same rows, sources and figures."""
    found = Trajectory.load(way.save(tmp_path / f"way{suffix}"))

    assert dict(way.origin) == dict(found.origin)
    assert list(way.frame["parameter"]) == list(found.frame["parameter"])
    for name in ("along", "relative", "step_relative"):
        np.testing.assert_allclose(way.frame[name], found.frame[name], rtol=1e-12)
    assert way.where(step=2).top(3).sites == found.where(step=2).top(3).sites


def test_it_says_what_it_is_of(way: Trajectory) -> None:
    """The repr names the checkpoints in their order."""
    assert f"Trajectory: {len(way)} rows, base → sft → rl" == way.summary
    assert way.summary in repr(way)


def test_wrong_asks_are_told(ladder: list[Path], way: Trajectory) -> None:
    """One checkpoint is no way, and groups have names."""
    with pytest.raises(TableError, match="a start and at least one step, got 1"):
        trajectory(ladder[:1])
    with pytest.raises(TableError, match="can't aggregate by 'head'"):
        way.by("head")


def test_names_of_digits_stay_names(ladder: list[Path], tmp_path: Path, save: Callable[..., Path]) -> None:
    """A checkpoint called 60 is not the number 60, nor is one called nan nothing."""
    base, once, _ = ladder
    steps = [once.rename(tmp_path / "60"), save(tiny("llama"), "nan")]
    way = trajectory([base, *steps], progress=False)
    steps[0].rename(once)

    found = Trajectory.load(way.save(tmp_path / "way.csv"))

    assert ["60", "nan"] == list(found.frame["name"].unique())


def test_what_is_said_of_a_control_is_dropped_whatever_its_words(
    ladder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stands in for a control; sentences about one are known by where they come from."""
    monkeypatch.setattr("affectlens.drift.diffing._control", lambda _: iter(["It rests."]))
    base, once, _ = ladder

    findings = trajectory([base, once, base], progress=False).findings

    assert not any("It rests." in finding for finding in findings)
    assert any("did not move at all" in finding for finding in findings)


def test_unread_norms_spoil_no_ratio(way: Trajectory) -> None:
    """The relative drift of a group runs over the sites whose norm is known, as in a drift."""
    frame = way.frame[(way.frame["step"] == 1) & (way.frame["role"] == "gate_proj")].reset_index(drop=True)
    frame.loc[0, "base_norm"] = np.nan
    row = Trajectory(frame, way.origin).by("role").iloc[0]

    assert frame.loc[1, "relative"] == pytest.approx(row["relative"])
    assert 1 == row["norms_known"]
