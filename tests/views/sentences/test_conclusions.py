"""The sentences follow the numbers, in every branch from 'the gate leads' to 'no effect detected'."""

from collections.abc import Callable

import pandas as pd
import pytest

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.errors import TableError
from affectlens.views import conclude

Drifts = Callable[..., Drift]
Sweeps = Callable[..., Effects]
GATE = {"q_proj": 0.05, "o_proj": 0.2, "gate_proj": 0.6, "up_proj": 0.15, "down_proj": 0.15}
ATTENTION = {**GATE, "o_proj": 0.6, "gate_proj": 0.2}


def test_gate_wins(make_effects: Sweeps) -> None:
    """If the gate recovers most, a sentence says so; whether it exceeds a null of 20 draws stays open."""
    found = conclude(None, make_effects(GATE))

    assert (
        "On emotion, gate_proj alone recovers 60\xa0% of the gain, more than any other role tried."
        == found.answer
    )
    assert said(
        found.may_not,
        "whether gate_proj exceeds its null is open: its effect is matched or exceeded by 0 of 20",
    )
    assert said(found.may_not, "20 draws are too few to test it")
    assert said(found.may, "gate_proj recovers more of the gain than the best attention role")
    assert said(found.may, "gate_proj undoes the largest part of the gain (−0.48")


def test_attention_wins(make_effects: Sweeps) -> None:
    """If attention recovers more than the gate, a sentence says so with both effects."""
    found = conclude(None, make_effects(ATTENTION))

    assert (
        "On emotion, o_proj alone recovers 60\xa0% of the gain, more than gate_proj (20\xa0%)."
        == found.answer
    )
    assert said(
        found.may,
        "the best attention role recovers more of the gain than gate_proj (o_proj, best of 2 attention "
        "roles: +0.6 [+0.55 to +0.65], 256 parameters; gate_proj: +0.2 [+0.15 to +0.25], 768 parameters)",
    )


def test_overlap_leaves_the_order_open(make_effects: Sweeps) -> None:
    """If the intervals of gate and attention overlap, their order stays open."""
    found = conclude(None, make_effects(GATE, wide=0.25))

    assert "60\xa0% of the gain, though not clearly more than o_proj, up_proj or down_proj." in found.answer
    assert said(
        found.may_not, "whether gate_proj recovers more of the gain than the best attention role is open"
    )
    assert "not clearly more than gate_proj" in conclude(None, make_effects(ATTENTION, wide=0.25)).answer


def test_runner_up_that_overlaps_is_named(make_effects: Sweeps) -> None:
    """A leading role is named together with those whose intervals overlap its own, for both actions."""
    moved = {"v_proj": 0.50, "o_proj": 0.45, "gate_proj": 0.2, "up_proj": 0.1}
    close, clear = conclude(None, make_effects(moved)), conclude(None, make_effects(ATTENTION))

    assert said(close.may, "v_proj recovers the largest part of the gain (+0.5 [+0.45 to +0.55]; 50\xa0% of ")
    assert said(close.may, "of the gain over base), though not clearly more than o_proj.")
    assert said(close.may, "undoes the largest part of the gain (−0.4 [−0.45 to −0.35]), though not clearly")
    assert "gate_proj (20\xa0%), though not clearly more than o_proj." in close.answer
    assert not said(clear.may, "not clearly")


@pytest.mark.parametrize(("cost", "there"), [(0.9, True), (0.51, False)])
def test_two_roles_are_told_apart_only_if_both_lead_clearly(
    make_effects: Sweeps, cost: float, there: bool
) -> None:
    """Transplant and revert are said to disagree only if each has a clear leader."""
    effects = make_effects(ATTENTION)
    frame = effects.frame
    rows = (frame["action"] == "revert") & (frame["kind"] == "effect") & (frame["sites"] == "up_proj")
    frame.loc[rows, ["effect", "effect_low", "effect_high"]] = [-cost, -cost - 0.05, -cost + 0.05]
    found = conclude(None, effects)

    assert said(found.may, "up_proj undoes the largest part")
    assert there == said(found.may_not, "no single role leads both ways: o_proj recovers the largest part")


def test_nothing_is_seen(make_effects: Sweeps) -> None:
    """If all intervals include zero, no effect was detected; none is called zero."""
    found = conclude(None, make_effects(dict.fromkeys(GATE, 0.02)))

    assert "On emotion, no effect of any single role was detected." == found.answer
    assert said(found.may_not, "no effect of transplanting any single role into base was detected")
    assert said(found.may_not, "gate_proj can't be told apart: no effect of either was detected")


def test_no_gain_no_shares(make_effects: Sweeps) -> None:
    """Without a gain clear of zero, no share of it is given."""
    found = conclude(None, make_effects(GATE, gain=0.03))

    assert "On emotion, no effect of tuning was detected." == found.answer
    assert not said(found.may, "%")


@pytest.mark.parametrize(
    ("draws", "null", "where", "words"),
    [
        (
            20,
            0.9,
            "may_not",
            "gate_proj does not exceed its null: its effect is matched or exceeded by 4 of 20",
        ),
        (5, 0.1, "may_not", "whether gate_proj exceeds its null is open"),
        (999, 0.1, "may", "gate_proj exceeds its null: its effect is matched or exceeded by 0 of 999"),
        (0, 0.1, "may_not", "whether gate_proj exceeds its null is unknown: no null was drawn"),
    ],
)
def test_null_decides_who_stands_out(
    make_effects: Sweeps, draws: int, null: float, where: str, words: str
) -> None:
    """An effect exceeds its null only if there are enough draws and few are as strong."""
    found = conclude(None, make_effects(GATE, draws=draws, null=null))

    assert said(getattr(found, where), words)
    assert ("p = 0.001" in " ".join(found.may)) == (draws == 999)


def test_interaction_gap_is_whole_minus_sum(make_effects: Sweeps) -> None:
    """The roles' effects sum to 1.15, the whole makes 1: the gap is −0.15."""
    found = conclude(None, make_effects(GATE))

    assert said(found.may, "sum to +1.15, that of the whole change is +1: an interaction gap of −0.15")


@pytest.mark.parametrize(
    ("attention", "mlp", "where", "words"),
    [
        (0.9, 0.3, "may", "all of attention recovers more of the gain than the whole MLP"),
        (0.3, 0.9, "may", "the whole MLP recovers more of the gain than all of attention"),
        (0.5, 0.55, "may_not", "have overlapping intervals, so neither clearly recovers more"),
    ],
)
def test_whole_blocks_are_held_against_each_other(
    make_effects: Sweeps, attention: float, mlp: float, where: str, words: str
) -> None:
    """All of attention is compared with the whole MLP if their intervals are apart."""
    found = conclude(None, make_effects({**GATE, "attention": attention, "mlp": mlp}))

    assert said(getattr(found, where), words)


@pytest.mark.parametrize(
    ("control", "where", "words"),
    [
        (
            0.02,
            "may",
            "for comparison, the control tuning's change at the same sites has an effect of +0.02 [",
        ),
        (0.58, "may_not", "not shown to be specific to affect"),
    ],
)
def test_control_tuning_is_held_beside(make_effects: Sweeps, control: float, where: str, words: str) -> None:
    """The control's effect at the same sites is reported for comparison; exceeding it is no finding."""
    found = conclude(None, make_effects(GATE, control=control))

    assert said(getattr(found, where), words)
    assert not said(found.may, "more than a tuning on other data")


def test_metrics_may_disagree(make_effects: Sweeps) -> None:
    """If another role leads under another metric, a sentence says so and how clearly it leads."""
    found = []
    for wide in (0.05, 0.25):
        frames = [make_effects(GATE).frame, make_effects(ATTENTION, metric="accuracy", wide=wide).frame]
        found.append(conclude(None, Effects(pd.concat(frames), make_effects(GATE).origin)))

    assert said(found[0].may_not, "which role leads depends on the metric: by accuracy, o_proj leads.")
    assert said(found[1].may_not, "on the metric: by accuracy, o_proj leads, though not clearly.")


def test_fitted_tasks_and_deletions_are_named(make_effects: Sweeps) -> None:
    """A task whose examples were trained on is labelled, and zeroing the gate is called deleting the MLP."""
    effects = make_effects(GATE, actions=("transplant", "zero"))
    effects.origin["tasks"]["emotion"]["fit"] = True
    found = conclude(None, effects)

    assert said(found.may_not, "emotion: the tuned model was trained on these examples")
    assert said(found.may_not, "zero-ablation says nothing about the gate")


def test_noise_and_control_take_the_lead_away(make_drift: Drifts) -> None:
    """A lead under the relative norm that noise also gives is no evidence for a link to affect."""
    found = conclude(make_drift())

    assert said(found.may, "By ‖Δ‖/‖W‖, q_proj moved most") or said(
        found.may, "By ‖Δ‖/‖W‖, o_proj moved most"
    )
    assert said(
        found.may_not,
        "no evidence for a link to affect: it also leads under iid noise (tied with o_proj) and",
    )
    assert said(found.may, "All 7 roles moved by a similar rms")
    assert said(
        found.may_not, "(median ratio 1.25), under iid noise in 4 (ratio 1.25), so this lead is no evidence"
    )


@pytest.mark.parametrize(
    ("gate", "where", "words"),
    [
        (2.0, "may", "gate_proj moved more than up_proj under every norm"),
        (0.5, "may", "gate_proj did not move more than up_proj under any norm"),
        (0.9, "may_not", "depends on the norm: it did by ‖Δ‖/‖W‖, but not by ‖Δ‖, rms"),
    ],
)
def test_gate_against_up_under_every_norm(make_drift: Drifts, gate: float, where: str, words: str) -> None:
    """A claim about gate and up is made only if every norm agrees."""
    found = conclude(make_drift(scale={"gate_proj": gate}))

    assert said(getattr(found, where), words)


@pytest.mark.parametrize(
    ("gate", "control", "where", "words"),
    [
        (0.76, 0.5, "may_not", "(median ratio 0.95), under iid noise in 0 (ratio 0.9): no lead by this norm"),
        (
            1.4,
            1.4,
            "may_not",
            "under the control tuning in 4 (ratio 1.75), so this lead is no evidence for a link to",
        ),
        (
            1.4,
            0.5,
            "may",
            "(median ratio 1.75), under iid noise in 0 (ratio 0.9): more than noise gives, in this",
        ),
    ],
)
def test_lead_over_noise_is_a_lead_and_the_tunings_own(
    make_drift: Drifts, gate: float, control: float, where: str, words: str
) -> None:
    """Exceeding noise is no finding if the gate doesn't lead, or leads as far under the control."""
    drift = make_drift(scale={"gate_proj": gate})
    frame, rows = drift.frame, drift.frame["role"] == "gate_proj"
    up = frame.loc[frame["role"] == "up_proj", "control_relative"].iloc[0]
    frame.loc[rows, "control_relative"] = up * control * 1.25
    with pytest.MonkeyPatch.context() as patch:
        rows_of = Drift.contrast
        patch.setattr(Drift, "contrast", lambda *a: rows_of(*a).assign(noise_ratio=0.9, noise_larger=0))
        found = conclude(drift)

    assert said(getattr(found, where), words)
    assert said(found.may, "more than noise") == (where == "may")


def test_still_and_unreached_weights_are_named(make_drift: Drifts) -> None:
    """No drift at all and roles out of reach are both reported."""
    still, reached = make_drift(scale=dict.fromkeys(("q_proj", *GATE, "k_proj", "v_proj"), 0.0)), make_drift()
    reached.frame.loc[reached.frame["role"] == "v_proj", "targeted"] = False

    assert said(conclude(still).may_not, "did not move at all")
    assert said(conclude(reached).may_not, "could not reach v_proj")


def test_one_pair_is_descriptive(make_drift: Drifts, make_effects: Sweeps) -> None:
    """The general limits are listed whatever the numbers are."""
    found = conclude(make_drift(control=False), make_effects(GATE))

    assert said(found.may_not, "The unit of replication is the training run")
    assert said(found.may_not, "Norms are not function")
    assert said(found.may_not, "No control tuning was compared")
    assert str(found).startswith(found.answer)


def test_nothing_to_conclude_from() -> None:
    """Without a table, `conclude` raises an error."""
    with pytest.raises(TableError, match="nothing to conclude from"):
        conclude(None)


def said(sentences: tuple[str, ...], words: str) -> bool:
    """Return whether one of the sentences contains the words."""
    return any(words in sentence for sentence in sentences)
