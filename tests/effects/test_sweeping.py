"""Sweeps: references are the models themselves, nulls are real changes, and runs repeat."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import affectlens as al
from affectlens.cli.text import tell_effects
from affectlens.effects.effects import compare
from affectlens.effects.grid import Grid
from affectlens.errors import NothingToCompare, TableError, TaskError
from affectlens.sites import ATTENTION, MLP
from affectlens.stats.intervals import Interval


@pytest.fixture(scope="module")
def tasks(demo: al.Demo) -> list[al.Task]:
    return [demo.task("faces-unseen").head(40), demo.task("turned-unseen").head(20)]


@pytest.fixture(scope="module")
def grid(demo: al.Demo) -> al.Grid:
    actions = ("transplant", "revert", "zero")
    return al.Grid(demo.base.sites, "role", actions, donor=demo.tuned, control=demo.control, n_random=3)


@pytest.fixture(scope="module")
def effects(lens: al.Lens, grid: al.Grid, tasks: list[al.Task]) -> al.Effects:
    return al.sweep(lens, grid, tasks, progress=False)


def pick(effects: al.Effects, **fields: object) -> pd.Series:
    return effects.where(**fields).frame.iloc[0]


def test_the_references_are_the_models_themselves(
    effects: al.Effects, demo: al.Demo, lens: al.Lens, tasks: list[al.Task]
) -> None:
    """Base with all moved weights scores the same as tuned, loaded from its own files."""
    tuned = al.load(demo.tuned, dtype="float32")
    for task in tasks:
        row = pick(effects, kind="reference", task=task.name, metric="margin")
        assert al.evaluate(tuned, task).values("margin").mean() == pytest.approx(row["value"], abs=1e-5)
        assert al.evaluate(lens, task).values("margin").mean() == pytest.approx(row["baseline"], abs=1e-5)


def test_every_unit_is_there(effects: al.Effects, tasks: list[al.Task]) -> None:
    """Seven roles × three actions, the control, two references, and draws for the affective task only."""
    counts = effects.where(metric="margin").frame.groupby(["kind", "task"]).size().to_dict()

    for task in tasks:
        draws = 2 * 2 * 3 if task.role == "affective" else 0  # families × actions × draws
        assert (1, 7 * 3, 7 + 1, draws) == (
            counts[("reference", task.name)],
            counts[("effect", task.name)],
            counts[("control-tuning", task.name)],
            counts.get(("random-control", task.name), 0),
        )


def test_zero_gate_up_and_down_are_one_deletion(effects: al.Effects) -> None:
    """The sweep shows that zero-ablation can't tell the gate from the rest of the MLP."""
    rows = effects.where(action="zero", metric="margin", task="faces-unseen").frame.set_index("sites")[
        "value"
    ]

    assert rows["gate_proj"] == rows["up_proj"] == rows["down_proj"]
    assert rows["gate_proj"] != rows["q_proj"]


def test_effects_lie_in_their_intervals(effects: al.Effects) -> None:
    """value = baseline + effect, and each is inside its interval."""
    frame = effects.frame

    assert pytest.approx(frame["value"]) == frame["baseline"] + frame["effect"]
    assert (frame["low"] <= frame["value"]).all()
    assert (frame["value"] <= frame["high"]).all()
    assert (frame["effect_low"] <= frame["effect"]).all()
    assert (frame["effect"] <= frame["effect_high"]).all()


def test_a_sweep_repeats(lens: al.Lens, grid: al.Grid, tasks: list[al.Task], effects: al.Effects) -> None:
    """The same grid gives the same table, to the bit, and leaves the model as it was."""
    before = {name: p.detach().clone() for name, p in lens.model.named_parameters()}
    again = al.sweep(lens, grid, tasks, progress=False)

    pd.testing.assert_frame_equal(effects.frame, again.frame)
    assert all(torch.equal(before[name], p) for name, p in lens.model.named_parameters())


def test_draws_take_one_role_a_layer(demo: al.Demo) -> None:
    """Each draw of a family is a real change of one of its roles in every layer."""
    units = list(Grid(demo.base.sites, donor=demo.tuned, n_random=30).units(demo.base.sites, demo.base))
    draws = [unit for unit in units if unit.kind == "random-control"]

    assert 2 * 2 * 30 == len(draws)
    for unit in draws:
        layers = [site.layer for site in unit.sites if site.param == "weight"]
        assert sorted(set(layers)) == sorted(layers)
        assert {site.role for site in unit.sites} <= set(MLP if unit.null_of == "mlp" else ATTENTION)
    assert 1 < len({unit.sites for unit in draws})


def test_no_p_below_999_draws(effects: al.Effects) -> None:
    """Three draws rank an effect but give no p."""
    ranks = effects.ranks()

    assert {3} == set(ranks["draws"])
    assert ranks["p"].isna().all()
    assert ranks["at_least"].between(0, 3).all()


def test_p_counts_the_draws() -> None:
    """With 999 draws of which 49 are as strong, p = 50/1000; for a revert, strong means negative."""
    rows = [
        {"action": a, "sites": "gate_proj", "kind": "effect", "effect": e, "null_of": "mlp"}
        for a, e in (("transplant", 1.0), ("revert", -1.0))
    ]
    for action, sign in (("transplant", 1), ("revert", -1)):
        rows += [
            {"action": action, "sites": f"mlp #{i}", "kind": "random-control", "null_of": "mlp",
             "effect": sign * (2.0 if i < 49 else 0.5)}
            for i in range(999)
        ]  # fmt: skip
    ranks = al.Effects(pd.DataFrame(rows).assign(task="t", metric="margin")).ranks()

    assert [49, 49] == list(ranks["at_least"])
    assert [0.05, 0.05] == list(ranks["p"])


def test_ranks_follow_the_way_tuning_went() -> None:
    """Where tuning lowered a task, strong means negative: none of these draws is as strong."""
    rows = [
        {"action": "transplant", "sites": "all", "kind": "reference", "effect": -2.0, "effect_high": -1.5},
        {"action": "transplant", "sites": "gate_proj", "kind": "effect", "effect": -1.5, "null_of": "mlp"},
    ]
    draw = {"action": "transplant", "sites": "mlp #0", "kind": "random-control", "null_of": "mlp"}
    rows += [{**draw, "effect": -0.3}] * 20

    assert [0] == list(al.Effects(pd.DataFrame(rows).assign(task="t", metric="margin")).ranks()["at_least"])


def test_a_reference_that_is_not_tuned_itself_says_so(
    save: Callable[..., Path], lens: al.Lens, tasks: list[al.Task], demo: al.Demo, tmp_path: Path
) -> None:
    """Settings that differ can't be transplanted, so they are a finding."""
    shutil.copytree(Path(demo.tuned.store.source), tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text("utf-8"))
    config["text_config"]["rms_norm_eps"] = 0.1
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config), "utf-8")

    swept = al.sweep(lens, al.Grid(demo.base.sites, donor=tmp_path / "tuned", n_random=0), tasks[0].head(6))
    drift = al.diff(demo.base, tmp_path / "tuned")

    (finding,) = swept.origin["findings"]
    assert "not the tuned model itself" in finding
    assert "text_config.rms_norm_eps" in finding
    assert "text_config.rms_norm_eps" in " ".join(drift.findings)
    assert (
        []
        == al.sweep(lens, al.Grid(demo.base.sites, donor=demo.tuned, n_random=0), tasks[0].head(6)).origin[
            "findings"
        ]
    )


def test_one_model_knows_where_it_came_from(effects: al.Effects, demo: al.Demo) -> None:
    """The origin of a sweep identifies the loaded base by its hashes."""
    assert demo.base.identity == effects.origin["sources"]["base"]
    assert "float32" == effects.origin["dtype"]


def test_two_tasks_of_one_name_are_refused(lens: al.Lens, grid: al.Grid, tasks: list[al.Task]) -> None:
    """Their rows could not be distinguished."""
    with pytest.raises(TaskError, match="two tasks are called 'faces-unseen'"):
        al.sweep(lens, grid, [tasks[0], tasks[0]])


def test_a_control_that_lacks_a_site_is_left_out_there(
    lens: al.Lens, demo: al.Demo, tasks: list[al.Task], tmp_path: Path
) -> None:
    """A group with a site that the control lacks has no control row; the others have one."""
    tensors = load_file(Path(demo.control.store.source) / "model.safetensors")
    name = next(name for name in tensors if "layers.0.mlp.up_proj" in name)
    tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")

    grid = al.Grid(demo.base.sites, donor=demo.tuned, control=tmp_path, n_random=0)
    found = al.sweep(lens, grid, tasks[0].head(6)).where(kind="control-tuning", metric="margin").frame

    assert "up_proj" not in set(found["sites"])
    assert "gate_proj" in set(found["sites"])


def test_the_null_needs_roles_that_moved_in_the_same_layers(demo: al.Demo) -> None:
    """A role that moved in other layers than the gate is not in its null."""
    mlp = demo.base.sites.where(tower="language", role="mlp")
    moved = mlp - mlp.where(role="up_proj", layer=1)
    units = al.Grid(demo.base.sites, donor=demo.tuned, n_random=2).units(moved, demo.base)

    assert {"gate_proj/down_proj"} == {unit.null_of for unit in units if unit.kind == "random-control"}


def test_the_null_has_the_layers_of_the_group(demo: al.Demo) -> None:
    """A grid over two layers draws in these two; a group in only some of the layers gets no null."""
    few = demo.base.sites.where(layer=[0, 1])
    units = list(al.Grid(few, donor=demo.tuned, n_random=2).units(demo.base.sites, demo.base))
    part = {"early gates": few.where(tower="language", role="gate_proj")}
    parted = list(al.Grid(demo.base.sites, part, donor=demo.tuned).units(demo.base.sites, demo.base))

    draws = [unit for unit in units if unit.kind == "random-control"]
    assert 2 * 2 * 2 == len(draws)
    assert {(0, 1)} == {tuple(sorted({site.layer for site in unit.sites})) for unit in draws}
    assert {("effect", "")} == {(unit.kind, unit.null_of) for unit in parted}


def test_no_share_of_a_gain_that_is_not_there(lens: al.Lens, tasks: list[al.Task]) -> None:
    """Where tuned is not clearly better than base, `recovered` is NaN."""
    scores = al.evaluate(lens, tasks[0])

    assert all(row["recovered"] != row["recovered"] for row in compare(scores, scores, gain=(scores, scores)))


@pytest.mark.parametrize(
    ("interval", "divides"),
    [
        ((1.0, 0.6, 1.4), True),
        ((0.24, 0.08, 0.40), False),
        ((1.0, -0.1, 2.1), False),
        ((-1.0, -1.4, -0.6), True),
    ],
)
def test_shares_need_a_gain_that_is_known(interval: tuple[float, float, float], divides: bool) -> None:
    """Clear of zero is not enough: a gain with an interval wider than itself gives no share."""
    assert divides == Interval(*interval).divides


def test_a_donor_that_equals_base_is_told(lens: al.Lens, demo: al.Demo, tasks: list[al.Task]) -> None:
    """A donor with the base's own weights is an error."""
    with pytest.raises(NothingToCompare, match="equals the base in every weight"):
        al.sweep(lens, al.Grid(demo.base.sites, donor=demo.base), tasks)


def test_wrong_grids_are_told(demo: al.Demo) -> None:
    """Errors of unknown actions and groupings list the known ones."""
    with pytest.raises(TableError, match="Did you mean 'revert'"):
        al.Grid(demo.base.sites, actions=("revers",), donor=demo.tuned)
    with pytest.raises(TableError, match=r"can't group sites by 'rule'. By: site, role"):
        al.Grid(demo.base.sites, "rule", donor=demo.tuned)
    with pytest.raises(TableError, match="each may be given once, got transplant, transplant"):
        al.Grid(demo.base.sites, "role", ("transplant", "transplant"), donor=demo.tuned)
    with pytest.raises(TableError, match="n_random must be 0 or more, got -3"):
        al.Grid(demo.base.sites, donor=demo.tuned, n_random=-3)
    with pytest.raises(TableError, match="finest grouping"):
        al.Grid(demo.base.sites, "site,role", donor=demo.tuned)


@pytest.mark.parametrize(
    ("by", "actions", "draws"),
    [
        ("layer", ("transplant",), 2),
        ("role,layer", ("revert",), 2),
        ("role", ("zero",), 2),
        ("tower", ("revert",), 0),
    ],
)
def test_sweeps_without_a_null_can_be_told(
    by: str, actions: tuple[str, ...], draws: int, lens: al.Lens, demo: al.Demo, tasks: list[al.Task]
) -> None:
    """Where no group has a null, there are no draws and no ranks, and the effects are still printed."""
    grid = al.Grid(demo.base.sites, by, actions, donor=demo.tuned, n_random=draws)
    found = al.sweep(lens, grid, tasks[0].head(6), progress=False)

    assert "random-control" not in set(found.frame["kind"])
    assert 0 == len(found.ranks())
    assert 5 <= len(tell_effects(found))


def test_labels_of_several_lengths_are_a_finding(lens: al.Lens, demo: al.Demo) -> None:
    """Summed log-probabilities favour shorter labels, so the table says so."""
    faces = demo.task("faces-unseen").head(8)
    examples = tuple(replace(e, label="furious" if e.label == "angry" else e.label) for e in faces.examples)
    labels = tuple("furious" if label == "angry" else label for label in faces.labels)
    task = replace(faces, examples=examples, labels=labels)

    (finding,) = al.sweep(lens, al.Grid(demo.base.sites, donor=demo.tuned, n_random=0), task).origin[
        "findings"
    ]

    assert "longer labels are at a disadvantage" in finding
