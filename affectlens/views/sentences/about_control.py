"""Say what the control tuning does at the same sites, and whether it orders the groups in the same way.

On an affective task the control tuning does little by construction, so exceeding it there is no
finding. Whether an order of groups is specific to affect is judged on each tuning's own tasks, as a
difference in differences: which group leads, as a share of that tuning's own gain.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from affectlens.printable import plain
from affectlens.sites import ATTENTION
from affectlens.views.readings.numbers import listed, percent
from affectlens.views.readings.of_effects import WHOLE, EffectRow, Outcome, Reading
from affectlens.views.sentences.wording import Said, allowed, barred

Pair = tuple[EffectRow, EffectRow]
CONTROL = "control-tuning"


@dataclass(frozen=True)
class Contrast:
    """Two groups to compare: their names, how to find them in a task, and the claim if either leads."""

    names: tuple[str, str]
    claims: tuple[str, str]
    find: Callable[[Sequence[EffectRow], float], Pair | None]


@dataclass(frozen=True)
class OwnTask:
    """The shares of a tuning's gain that two groups recover on one of its own tasks."""

    task: str
    shares: tuple[float, float]
    apart: bool  # whether their intervals do not overlap


def at_same_sites(reading: Reading) -> Iterator[Said]:
    """Say what the control tuning's change of the best group and of the gate does to one task."""
    shown = {one.group: one for one in (reading.best("transplant"), reading.gate) if one is not None}
    beside: list[Pair] = []
    level: list[Pair] = []
    for one in shown.values():
        control = reading.outcome.change("transplant", one.group, kind=CONTROL)
        if control is not None:
            (beside if control.apart(one) else level).append((one, control))
    if beside:
        each = listed(f"{control.measured} ({one.name})" for one, control in beside)
        yield allowed(
            f"for comparison, the control tuning's change at the same sites has an effect of {each}."
        )
    for one, control in level:
        yield barred(
            f"the effect of {one.name} is not shown to be specific to affect: its interval overlaps that of "
            f"the control tuning's change ({one.measured}; control: {control.measured})."
        )


def own_tasks(readings: Sequence[Reading]) -> Iterator[Said]:
    """Say whether each tuning, on its own tasks, orders the groups in the same way."""
    found = [one.outcome for one in readings]
    pairs = [
        (contrast, _owned(contrast, found), _owned(contrast, found, control=True)) for contrast in CONTRASTS
    ]
    # Without an affective order there is nothing to compare, and nothing to report as missing.
    if any(affect for _, affect, _ in pairs) and not any(control for *_, control in pairs):
        if any(one.changes("transplant", CONTROL) for one in found):
            yield barred(
                "The control tuning has no task of its own here to compare with (kind 'control', new "
                "examples, a gain clear of zero, the same groups), so whether an order of groups is specific "
                "to affect is unknown."
            )
        return
    shown: set[tuple[str, ...]] = set()
    for contrast, affect, control in pairs:
        if (ahead := _ahead(affect)) is None:
            continue
        if not control:
            claim = contrast.claims[ahead]
            yield barred(
                f"Whether it is specific to affect that {claim} is unknown: the control tuning lacks these "
                "groups."
            )
            continue
        # The names of the tasks are given once: the second sentence is long enough without them.
        tasks = tuple(own.task for own in (*affect, *control))
        figures = _figures(contrast, affect=affect, control=control, named=tasks not in shown)
        shown.add(tasks)
        yield _verdict(contrast, figures, ahead=ahead, theirs=_ahead(control))


def _verdict(contrast: Contrast, figures: str, *, ahead: int, theirs: int | None) -> Said:
    claim = contrast.claims[ahead]
    if theirs is None:
        return barred(
            f"Whether it is specific to affect that {claim} is open, since the control tuning's own "
            f"tasks settle no order: {figures}."
        )
    if theirs == ahead:
        return barred(f"That {claim} is not specific to affect: {figures}.")
    return allowed(
        f"The two tunings differ, each on its own tasks: under affect tuning {claim}, under the control "
        f"tuning {contrast.claims[theirs]}; {figures}."
    )


def _figures(contrast: Contrast, *, affect: list[OwnTask], control: list[OwnTask], named: bool) -> str:
    one, two = contrast.names
    theirs, ours = (f" ({listed(own.task for own in owns)})" if named else "" for owns in (control, affect))
    return (
        f"on the control tuning's own tasks{theirs}, {one} recovers {_shares(control, 0)} of its gain "
        f"against {two}'s {_against(control)}; on the affect tuning's{ours}, {_shares(affect, 0)} against "
        f"{_against(affect)}"
    )


def _against(owns: list[OwnTask]) -> str:
    apart, tasks = sum(own.apart for own in owns), f"task{'s' if len(owns) > 1 else ''}"
    note = f" (intervals apart on {apart} of {len(owns)} {tasks})"
    return _shares(owns, 1) + (note if apart < len(owns) else "")


def _shares(owns: list[OwnTask], side: int) -> str:
    return listed(percent(own.shares[side]) for own in owns)


def _ahead(owns: list[OwnTask]) -> int | None:
    """Return the side that leads on every task with intervals apart, if those are more than half."""
    sides = [int(own.shares[1] > own.shares[0]) for own in owns if own.apart]
    settled = len(set(sides)) == 1 and 2 * len(sides) > len(owns)
    return sides[0] if settled else None


def _owned(contrast: Contrast, found: Sequence[Outcome], *, control: bool = False) -> list[OwnTask]:
    kept = []
    for one in found:
        ours = one.about.get("kind") == "control" and not one.fitted if control else one.leading
        whole = one.change("transplant", WHOLE, kind=CONTROL) if control else one.gain
        # Shares of a gain that is not clear of zero would be arbitrary numbers.
        if not ours or whole is None or not whole.divides:
            continue
        changes = one.changes("transplant", CONTROL if control else "effect")
        pair = contrast.find([change for change in changes if change.interval], whole.effect)
        if pair is not None:
            shares = (pair[0].effect / whole.effect, pair[1].effect / whole.effect)
            kept.append(OwnTask(plain(one.task), shares, pair[0].apart(pair[1])))
    return kept


def _blocks(changes: Sequence[EffectRow], _way: float) -> Pair | None:
    by_group = {one.group: one for one in changes}
    both = by_group.get("attention"), by_group.get("mlp")
    return None if both[0] is None or both[1] is None else (both[0], both[1])


def _roles(changes: Sequence[EffectRow], way: float) -> Pair | None:
    gate = next((one for one in changes if one.role == "gate_proj"), None)
    attention = [one for one in changes if one.role in ATTENTION]
    if gate is None or not attention:
        return None
    return max(attention, key=lambda one: one.effect * way), gate


CONTRASTS = (
    Contrast(
        ("attention", "the MLP"),
        ("attention recovers more than the MLP", "the MLP recovers more than attention"),
        _blocks,
    ),
    Contrast(
        ("the best attention role", "gate_proj"),
        (
            "the best attention role recovers more than gate_proj",
            "gate_proj recovers more than any attention role",
        ),
        _roles,
    ),
)
