"""The sentences follow the numbers: each branch, from 'the gate wins' to 'nothing to be seen'."""

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
    """Where the gate carries most, that is what may be said; 20 draws of its null are no test."""
    found = conclude(None, make_effects(GATE))

    assert (
        "On emotion, gate_proj alone carries 60\xa0% of the gain, the most of the roles tried."
        == found.answer
    )
    assert said(found.may_not, "whether gate_proj stands out is open; 0 of 20 draws")
    assert said(found.may_not, "20 draws make a picture, not a test")
    assert said(found.may, "the gate matters more than attention here")
    assert said(found.may, "gate_proj costs most (−0.48")


def test_attention_wins(make_effects: Sweeps) -> None:
    """Where attention carries more than the gate, the report says so in as many words."""
    found = conclude(None, make_effects(ATTENTION))

    assert (
        "On emotion, o_proj alone carries 60\xa0% of the gain, more than gate_proj (20\xa0%)." == found.answer
    )
    assert said(
        found.may,
        "attention matters more than the gate here (o_proj, best of 2 attention roles: +0.6 [+0.55 to "
        "+0.65], 256 parameters; gate_proj: +0.2 [+0.15 to +0.25], 768 parameters)",
    )


def test_overlap_leaves_the_order_open(make_effects: Sweeps) -> None:
    """Overlapping intervals forbid to say which of gate and attention matters more."""
    found = conclude(None, make_effects(GATE, wide=0.25))

    assert "60\xa0% of the gain, though not clearly more than o_proj, up_proj or down_proj." in found.answer
    assert said(found.may_not, "that the gate matters more than attention is open")
    assert "not clearly more than gate_proj" in conclude(None, make_effects(ATTENTION, wide=0.25)).answer


def test_runner_up_that_overlaps_is_named(make_effects: Sweeps) -> None:
    """The best role is not said to do most where the next one's interval overlaps; nor to cost most."""
    moved = {"v_proj": 0.50, "o_proj": 0.45, "gate_proj": 0.2, "up_proj": 0.1}
    close, clear = conclude(None, make_effects(moved)), conclude(None, make_effects(ATTENTION))

    assert said(close.may, "v_proj does most (+0.5 [+0.45 to +0.55], 50\xa0% of the gain over base), though ")
    assert said(close.may, "v_proj costs most (−0.4 [−0.45 to −0.35]), though not clearly more than o_proj.")
    assert "gate_proj (20\xa0%), though not clearly more than o_proj." in close.answer
    assert not said(clear.may, "not clearly")


@pytest.mark.parametrize(("cost", "there"), [(0.9, True), (0.51, False)])
def test_two_roles_are_told_apart_only_if_both_lead_clearly(
    make_effects: Sweeps, cost: float, there: bool
) -> None:
    """That sufficient and necessary differ needs a clear winner of both."""
    effects = make_effects(ATTENTION)
    frame = effects.frame
    rows = (frame["action"] == "revert") & (frame["kind"] == "effect") & (frame["sites"] == "up_proj")
    frame.loc[rows, ["effect", "effect_low", "effect_high"]] = [-cost, -cost - 0.05, -cost + 0.05]
    found = conclude(None, effects)

    assert said(found.may, "up_proj costs most")
    assert there == said(found.may_not, "sufficient and necessary are not the same role here")


def test_nothing_is_seen(make_effects: Sweeps) -> None:
    """Intervals that all include zero yield no effect, and none is called zero."""
    found = conclude(None, make_effects(dict.fromkeys(GATE, 0.02)))

    assert "On emotion, no single role carries an effect that this data could see." == found.answer
    assert said(found.may_not, "no single role put into base had an effect that this data could see")
    assert said(found.may_not, "attention and the gate can't be told apart")


def test_no_gain_no_shares(make_effects: Sweeps) -> None:
    """Without a gain clear of zero, no share of it is given."""
    found = conclude(None, make_effects(GATE, gain=0.03))

    assert "On emotion, tuning had no effect that this data could see." == found.answer
    assert not said(found.may, "%")


@pytest.mark.parametrize(
    ("draws", "null", "where", "words"),
    [
        (20, 0.9, "may_not", "gate_proj does not stand out; 4 of 20 draws"),
        (5, 0.1, "may_not", "whether gate_proj stands out is open"),
        (999, 0.1, "may", "gate_proj stands out; 0 of 999 draws"),
        (0, 0.1, "may_not", "whether gate_proj stands out is not known; no null was drawn"),
    ],
)
def test_null_decides_who_stands_out(
    make_effects: Sweeps, draws: int, null: float, where: str, words: str
) -> None:
    """A strong effect stands out only against enough draws, few of which are as strong."""
    found = conclude(None, make_effects(GATE, draws=draws, null=null))

    assert said(getattr(found, where), words)
    assert ("p = 0.001" in " ".join(found.may)) == (draws == 999)


def test_interaction_gap_is_whole_minus_sum(make_effects: Sweeps) -> None:
    """The roles' effects sum to 1.15, the whole makes 1: the gap is −0.15."""
    found = conclude(None, make_effects(GATE))

    assert said(found.may, "sum to +1.15, the whole change makes +1: an interaction gap of −0.15")


@pytest.mark.parametrize(
    ("attention", "mlp", "where", "words"),
    [
        (0.9, 0.3, "may", "put into base, attention does more"),
        (0.3, 0.9, "may", "put into base, the MLP does more"),
        (0.5, 0.55, "may_not", "their intervals overlap, so neither is clearly ahead"),
    ],
)
def test_whole_blocks_are_held_against_each_other(
    make_effects: Sweeps, attention: float, mlp: float, where: str, words: str
) -> None:
    """Attention as a whole and the MLP as a whole, with the parameters of each."""
    found = conclude(None, make_effects({**GATE, "attention": attention, "mlp": mlp}))

    assert said(getattr(found, where), words)


@pytest.mark.parametrize(
    ("control", "where", "words"),
    [
        (0.02, "may", "for comparison, the control tuning's change at the same sites gives +0.02 ["),
        (0.58, "may_not", "not shown to be special to affect"),
    ],
)
def test_control_tuning_is_held_beside(make_effects: Sweeps, control: float, where: str, words: str) -> None:
    """What another tuning does at the same sites stands beside; beating it there is no finding."""
    found = conclude(None, make_effects(GATE, control=control))

    assert said(getattr(found, where), words)
    assert not said(found.may, "more than a tuning on other data")


def test_metrics_may_disagree(make_effects: Sweeps) -> None:
    """When another metric crowns another role, the choice of metric is named, and how clear its winner is."""
    found = []
    for wide in (0.05, 0.25):
        frames = [make_effects(GATE).frame, make_effects(ATTENTION, metric="accuracy", wide=wide).frame]
        found.append(conclude(None, Effects(pd.concat(frames), make_effects(GATE).origin)))

    assert said(found[0].may_not, "the best role hangs on the metric: by accuracy, o_proj does most.")
    assert said(found[1].may_not, "on the metric: by accuracy, o_proj is ahead, though not clearly.")


def test_fitted_tasks_and_deletions_are_named(make_effects: Sweeps) -> None:
    """A task that was fitted on is labelled, and a zeroed gate is called a deleted MLP."""
    effects = make_effects(GATE, actions=("transplant", "zero"))
    effects.origin["tasks"]["emotion"]["fit"] = True
    found = conclude(None, effects)

    assert said(found.may_not, "emotion: fitted on")
    assert said(found.may_not, "zero-ablation can't speak for the gate")


def test_noise_and_control_take_the_lead_away(make_drift: Drifts) -> None:
    """A lead under the relative norm that noise gives too is no sign of affect."""
    found = conclude(make_drift())

    assert said(found.may, "By ‖Δ‖/‖W‖, q_proj moved most") or said(
        found.may, "By ‖Δ‖/‖W‖, o_proj moved most"
    )
    assert said(
        found.may_not, "is no sign of affect: noise of one rms (level with o_proj) and the control tuning"
    )
    assert said(found.may, "All 7 roles moved by much the same rms")
    assert said(found.may_not, "(ratio 1.25); noise alone gives 4 (ratio 1.25), so that lead is no evidence")


@pytest.mark.parametrize(
    ("gate", "where", "words"),
    [
        (2.0, "may", "gate_proj moved more than up_proj under every norm"),
        (0.5, "may", "gate_proj did not move more than up_proj under any norm"),
        (0.9, "may_not", "hangs on the norm: it holds by ‖Δ‖/‖W‖ and not by ‖Δ‖, rms"),
    ],
)
def test_gate_against_up_under_every_norm(make_drift: Drifts, gate: float, where: str, words: str) -> None:
    """The contrast is a claim only if every norm agrees."""
    found = conclude(make_drift(scale={"gate_proj": gate}))

    assert said(getattr(found, where), words)


@pytest.mark.parametrize(
    ("gate", "control", "where", "words"),
    [
        (0.76, 0.5, "may_not", "(ratio 0.95); noise alone gives 0 (ratio 0.9): by this norm it has no lead"),
        (1.4, 1.4, "may_not", "but the control tuning 4 (ratio 1.75), so that lead is no sign of affect"),
        (1.4, 0.5, "may", "(ratio 1.75); noise alone gives 0 (ratio 0.9): more than noise, in this pair"),
    ],
)
def test_lead_over_noise_is_a_lead_and_the_tunings_own(
    make_drift: Drifts, gate: float, control: float, where: str, words: str
) -> None:
    """More than noise is no finding where the gate isn't ahead, or is as far ahead under the control."""
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
    """No drift at all, and roles that could not be reached, are loud."""
    still, reached = make_drift(scale=dict.fromkeys(("q_proj", *GATE, "k_proj", "v_proj"), 0.0)), make_drift()
    reached.frame.loc[reached.frame["role"] == "v_proj", "targeted"] = False

    assert said(conclude(still).may_not, "did not move at all")
    assert said(conclude(reached).may_not, "could not reach v_proj")


def test_one_pair_is_descriptive(make_drift: Drifts, make_effects: Sweeps) -> None:
    """The standing limits stand, whatever the numbers."""
    found = conclude(make_drift(control=False), make_effects(GATE))

    assert said(found.may_not, "The run is the unit")
    assert said(found.may_not, "Norms are not function")
    assert said(found.may_not, "No control tuning was compared")
    assert str(found).startswith(found.answer)


def test_nothing_to_conclude_from() -> None:
    """Without a table there is nothing to say."""
    with pytest.raises(TableError, match="nothing to conclude from"):
        conclude(None)


def said(sentences: tuple[str, ...], words: str) -> bool:
    """Whether one of the sentences holds the words."""
    return any(words in sentence for sentence in sentences)
