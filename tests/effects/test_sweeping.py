"""Sweeps: references are the models themselves, nulls are real changes, and runs repeat."""

import pandas as pd
import pytest
import torch

import affectlens as al
from affectlens.effects.comparing import compare
from affectlens.effects.grid import Grid
from affectlens.errors import NothingToCompare, TableError
from affectlens.sites import ATTENTION, MLP


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
    """Base with all that moved scores what tuned, loaded from its own files, scores."""
    tuned = al.load(demo.tuned, dtype="float32")
    for task in tasks:
        row = pick(effects, kind="reference", task=task.name, metric="margin")
        assert al.evaluate(tuned, task).values("margin").mean() == pytest.approx(row["value"], abs=1e-5)
        assert al.evaluate(lens, task).values("margin").mean() == pytest.approx(row["baseline"], abs=1e-5)


def test_every_unit_is_there(effects: al.Effects, tasks: list[al.Task]) -> None:
    """Seven roles by three actions and the control, two references, and the draws on the affective task."""
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
    """value = baseline + effect, each between its ends."""
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
    """Three draws rank an effect; they test nothing."""
    ranks = effects.ranks()

    assert {3} == set(ranks["draws"])
    assert ranks["p"].isna().all()
    assert ranks["at_least"].between(0, 3).all()


def test_p_counts_the_draws() -> None:
    """With 999 draws of which 49 are as strong, p = 50/1000; for a revert, strong means down."""
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


def test_no_share_of_a_gain_that_is_not_there(lens: al.Lens, tasks: list[al.Task]) -> None:
    """Where tuned is not clearly better than base, a recovery ratio would be a number from nothing."""
    scores = al.evaluate(lens, tasks[0])

    assert all(row["recovered"] != row["recovered"] for row in compare(scores, scores, gain=(scores, scores)))


def test_a_donor_that_equals_base_is_told(lens: al.Lens, demo: al.Demo, tasks: list[al.Task]) -> None:
    """There is nothing to transplant."""
    with pytest.raises(NothingToCompare, match="equals the base in every weight"):
        al.sweep(lens, al.Grid(demo.base.sites, donor=demo.base), tasks)


def test_wrong_grids_are_told(demo: al.Demo) -> None:
    """Unknown actions and groups name what there is."""
    with pytest.raises(TableError, match="Did you mean 'revert'"):
        al.Grid(demo.base.sites, actions=("revers",), donor=demo.tuned)
    with pytest.raises(TableError, match=r"can't group sites by 'rule'. By: site, role"):
        al.Grid(demo.base.sites, "rule", donor=demo.tuned)
