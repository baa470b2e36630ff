"""What the control tuning takes away: what it does at the same sites, and what it shows on its own tasks.

On a task about affect the control tuning does little by construction, so beating it there is no
finding. Whether an order of groups is special to affect is read off each tuning's own tasks, as a
difference in differences: which group is ahead of which, and by how much of that tuning's own gain.
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
class Contest:
    """Two rivals, how they are found among a task's changes, and what is claimed if one is ahead."""

    names: tuple[str, str]
    claims: tuple[str, str]
    find: Callable[[Sequence[EffectRow], float], Pair | None]


@dataclass(frozen=True)
class Own:
    """What two rivals bring of a tuning's whole gain on one of its own tasks."""

    task: str
    shares: tuple[float, float]
    apart: bool


def at_same_sites(reading: Reading) -> Iterator[Said]:
    """Say what the control tuning's change of the leading groups does to one task."""
    shown = {one.group: one for one in (reading.best("transplant"), reading.gate) if one is not None}
    beside: list[Pair] = []
    level: list[Pair] = []
    for one in shown.values():
        control = reading.outcome.change("transplant", one.group, kind=CONTROL)
        if control is not None:
            (beside if control.apart(one) else level).append((one, control))
    if beside:
        each = listed(f"{control.measured} ({one.name})" for one, control in beside)
        yield allowed(f"for comparison, the control tuning's change at the same sites gives {each}.")
    for one, control in level:
        yield barred(
            f"the control tuning's change of {one.name} gives {control.measured}, the affect tuning's "
            f"{one.measured}: the intervals overlap, so it is not shown to be special to affect."
        )


def own_tasks(readings: Sequence[Reading]) -> Iterator[Said]:
    """Hold which group is ahead under affect tuning against the control tuning on its own tasks."""
    found = [one.outcome for one in readings]
    pairs = [(contest, _owned(contest, found), _owned(contest, found, control=True)) for contest in CONTESTS]
    if any(affect for _, affect, _ in pairs) and not any(control for *_, control in pairs):
        if any(one.changes("transplant", CONTROL) for one in found):
            yield barred(
                "The control tuning has no task of its own here to compare with (of kind 'control', with a "
                "gain clear of zero and the same groups), so whether an order of groups is special to "
                "affect isn't known."
            )
        return
    told: set[tuple[str, ...]] = set()
    for contest, affect, control in pairs:
        if (ahead := _ahead(affect)) is None:
            continue
        if not control:
            claim = contest.claims[ahead]
            yield barred(
                f"Whether it is special to affect that {claim} isn't known: the control has no such groups."
            )
            continue
        tasks = tuple(own.task for own in (*affect, *control))
        figures = _figures(contest, affect=affect, control=control, named=tasks not in told)
        told.add(tasks)
        yield _verdict(contest, figures, ahead=ahead, theirs=_ahead(control))


def _verdict(contest: Contest, figures: str, *, ahead: int, theirs: int | None) -> Said:
    claim = contest.claims[ahead]
    if theirs is None:
        return barred(
            f"Whether it is special to affect that {claim} is open, since the control tuning's own tasks "
            f"settle no order: {figures}."
        )
    if theirs == ahead:
        return barred(f"That {claim} is not special to affect: {figures}.")
    return allowed(
        f"The two tunings differ, each on its own tasks: {claim} under affect tuning, and "
        f"{contest.claims[theirs]} under the control tuning ({figures})."
    )


def _figures(contest: Contest, *, affect: list[Own], control: list[Own], named: bool) -> str:
    one, two = contest.names
    theirs, ours = (f" ({listed(own.task for own in owns)})" if named else "" for owns in (control, affect))
    return (
        f"on its own tasks{theirs} the control tuning's {one} brings {_shares(control, 0)} of its gain "
        f"against {two}'s {_against(control)}; the affect tuning's, on its own{ours}, {_shares(affect, 0)} "
        f"against {_against(affect)}"
    )


def _against(owns: list[Own]) -> str:
    apart = sum(own.apart for own in owns)
    return _shares(owns, 1) + (f" (apart on {apart} of {len(owns)})" if apart < len(owns) else "")


def _shares(owns: list[Own], side: int) -> str:
    return listed(percent(own.shares[side]) for own in owns)


def _ahead(owns: list[Own]) -> int | None:
    """The side that is ahead wherever intervals are apart, if they are on more than half of the tasks."""
    sides = [int(own.shares[1] > own.shares[0]) for own in owns if own.apart]
    settled = len(set(sides)) == 1 and 2 * len(sides) > len(owns)
    return sides[0] if settled else None


def _owned(contest: Contest, found: Sequence[Outcome], *, control: bool = False) -> list[Own]:
    kept = []
    for one in found:
        ours = one.about.get("kind") == "control" and not one.fitted if control else one.leading
        whole = one.change("transplant", WHOLE, kind=CONTROL) if control else one.gain
        if not ours or whole is None or not whole.divides:
            continue
        changes = one.changes("transplant", CONTROL if control else "effect")
        pair = contest.find([change for change in changes if change.interval], whole.effect)
        if pair is not None:
            shares = (pair[0].effect / whole.effect, pair[1].effect / whole.effect)
            kept.append(Own(plain(one.task), shares, pair[0].apart(pair[1])))
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


CONTESTS = (
    Contest(
        ("attention", "the MLP"),
        ("attention does more than the MLP", "the MLP does more than attention"),
        _blocks,
    ),
    Contest(
        ("best attention role", "gate_proj"),
        ("the best attention role does more than gate_proj", "gate_proj does more than any attention role"),
        _roles,
    ),
)
