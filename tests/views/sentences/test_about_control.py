"""Whether an order of groups is specific to affect is judged on each tuning's own tasks."""

from collections.abc import Callable

import pandas as pd
import pytest

from affectlens.effects.effects import Effects
from affectlens.views import conclude
from affectlens.views.sentences.about_control import OwnTask, _ahead
from affectlens.views.sentences.conclusions import Conclusions

Sweeps = Callable[..., Effects]
ATTENTION = {"o_proj": 0.4, "gate_proj": 0.2, "attention": 0.7, "mlp": 0.2}
MLP = {"o_proj": 0.1, "gate_proj": 0.3, "attention": 0.2, "mlp": 0.7}
LEVEL = {"o_proj": 0.2, "gate_proj": 0.22, "attention": 0.4, "mlp": 0.42}


def test_what_both_tunings_show_is_not_special_to_affect(make_effects: Sweeps) -> None:
    """The same order on each tuning's own tasks is not specific to affect; both shares are given."""
    found = conclude(None, both(make_effects, ATTENTION, gain=2.0))

    assert said(
        found,
        "may_not",
        "That attention recovers more than the MLP is not specific to affect: on the control tuning's own "
        "tasks (width), attention recovers 35\xa0% of its gain against the MLP's 10\xa0%; on the affect "
        "tuning's (emotion), 70\xa0% against 20\xa0%.",
    )
    assert said(found, "may_not", "That the best attention role recovers more than gate_proj is not specific")
    assert not any("The two tunings differ" in one for one in found.may)


def test_what_only_affect_tuning_shows_may_be_said(make_effects: Sweeps) -> None:
    """Opposite orders are a difference between the tunings, reported with its numbers."""
    found = conclude(None, both(make_effects, MLP))

    assert said(
        found,
        "may",
        "The two tunings differ, each on its own tasks: under affect tuning attention recovers more than "
        "the MLP, under the control tuning the MLP recovers more than attention; on the control tuning's "
        "own tasks (width), attention recovers 20\xa0% of its gain against the MLP's 70\xa0%",
    )
    assert not any(
        "not specific to affect: on the control tuning's own tasks" in one for one in found.may_not
    )


def test_control_that_settles_no_order_leaves_it_open(make_effects: Sweeps) -> None:
    """If intervals on the control's tasks overlap, the order stays open; the sentence counts the tasks."""
    found = conclude(None, both(make_effects, LEVEL))

    assert said(
        found, "may_not", "that attention recovers more than the MLP is open, since the control tuning's"
    )
    assert said(found, "may_not", "42\xa0% (intervals apart on 0 of 1 task)")


@pytest.mark.parametrize(
    ("apart", "ahead"),
    [
        ((1, 1, 0), None),  # each way once
        ((0, None, None), None),  # settled on one task of three
        ((0, 0, None), 0),
        ((1, 1, 1), 1),
        ((None,), None),
    ],
)
def test_a_lead_needs_most_of_the_tasks(apart: tuple[int | None, ...], ahead: int | None) -> None:
    """A side leads if it does on every task with intervals apart, and those are more than half."""
    owns = [OwnTask("t", (0.4, 0.2) if side != 1 else (0.2, 0.4), side is not None) for side in apart]

    assert ahead == _ahead(owns)


@pytest.mark.parametrize("case", ["no control task", "control task trained on", "no gain", "no intervals"])
def test_without_a_control_task_it_is_not_known(make_effects: Sweeps, case: str) -> None:
    """A control without its own task, a gain or intervals can't show what is specific to affect."""
    effects = both(make_effects, ATTENTION, gain=0.02 if case == "no gain" else 1.0)
    about = effects.origin["tasks"]["width"]
    about["kind"] = "neutral" if case == "no control task" else "control"
    about["fit"] = case == "control task trained on"
    if case == "no intervals":
        rows = (effects.frame["task"] == "width") & (effects.frame["sites"] != "all")
        effects.frame.loc[rows, ["effect_low", "effect_high"]] = float("nan")
    found = conclude(None, effects)

    assert said(found, "may_not", "The control tuning has no task of its own here to compare with")
    assert not any(
        "not specific to affect: on the control tuning's own tasks" in one for one in found.may_not
    )


def test_control_without_the_same_groups_tells_nothing_of_them(make_effects: Sweeps) -> None:
    """If the control's blocks were not tried as wholes, only the roles can be compared."""
    found = conclude(None, both(make_effects, {"o_proj": 0.4, "gate_proj": 0.2}))

    assert said(found, "may_not", "attention recovers more than the MLP is unknown: the control tuning lacks")
    assert said(
        found, "may_not", "the best attention role recovers more than gate_proj is not specific to affect"
    )


def test_without_a_control_it_is_not_known(make_effects: Sweeps) -> None:
    """Without a control tuning, whether an effect is specific to affect is unknown."""
    effects = make_effects(ATTENTION)
    found = conclude(None, Effects(effects.frame[effects.frame["kind"] != "control-tuning"], effects.origin))

    assert said(
        found, "may_not", "No control tuning was transplanted, so whether any effect here is specific"
    )


def both(make_effects: Sweeps, theirs: dict[str, float], *, gain: float = 1.0) -> Effects:
    """Return effects of affect tuning on `emotion` and of a control tuning (`theirs`) on its own task."""
    ours = make_effects(ATTENTION)
    own = make_effects(theirs, task="width", kind="control", gain=gain, actions=("transplant",))
    kept = own.frame[own.frame["kind"].isin(["effect", "reference"])].assign(kind="control-tuning")
    still = make_effects({}, task="width", gain=0.01).frame.query("kind == 'reference'")
    tasks = {**ours.origin["tasks"], **own.origin["tasks"]}
    return Effects(pd.concat([ours.frame, still, kept], ignore_index=True), {"tasks": tasks})


def said(found: Conclusions, where: str, words: str) -> bool:
    """Return whether a sentence of one list contains the words."""
    return any(words in sentence for sentence in getattr(found, where))
