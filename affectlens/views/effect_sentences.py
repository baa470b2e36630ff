"""What the effects allow one to say of one task: gain, the best role, its null, the control, the gaps."""

import math
from collections.abc import Iterator

from affectlens.html import plain
from affectlens.sites import ATTENTION, MLP
from affectlens.views.outcome import Change
from affectlens.views.reading import Reading
from affectlens.views.wording import Said, figure, joined, listed, percent, signed

RARE = 0.05  # the share of null draws that may be as strong before an effect no longer stands out
ENOUGH = 999  # draws below which a rank is a picture and no test


def about_effects(reading: Reading) -> Said:
    """Say what one task shows, in the order of the argument."""
    gain = reading.outcome.gain
    metric = plain(reading.outcome.metric)
    if gain is None:
        return reading.bars("the tuned model itself was not scored, so no share of its gain is known.")
    score = f"{figure(gain.baseline)} to {figure(gain.baseline + gain.effect)}"
    if not gain.clear:
        return reading.bars(
            f"tuning had no effect on {metric} that this data could see ({score}; change "
            f"{_measured(gain)}), so there is nothing to share out among roles."
        )
    verb = "raised" if gain.effect > 0 else "lowered"
    changed = reading.allows(f"tuning {verb} {metric} from {score} (change {_measured(gain)}).")
    if not reading.outcome.leading:
        return changed
    parts = [
        changed,
        *_sufficient(reading),
        *_attention_or_gate(reading),
        *_blocks(reading),
        *_necessary(reading),
        *_unseen(reading),
        *_gap(reading, gain),
        *_control(reading),
    ]
    return joined(parts)


def _sufficient(reading: Reading) -> Iterator[Said]:
    best = reading.best("transplant")
    parts = reading.parts("transplant")
    if not parts:
        return
    if best is None or not best.clear:
        yield reading.bars(f"no single {reading.kind} put into base had an effect that this data could see.")
        return
    share = f", {percent(best.recovered)} of the gain over base" if not math.isnan(best.recovered) else ""
    yield reading.allows(
        f"of {len(parts)} {reading.kind}s put into base one at a time, {best.name} does most "
        f"({_measured(best)}{share})."
    )
    yield _standing(reading, best)
    gate = reading.gate
    if gate is not None and gate.clear and gate.role != best.role:
        yield _standing(reading, gate)


def _standing(reading: Reading, change: Change) -> Said:
    rank, name = reading.rank(change), change.name
    if rank is None:
        return reading.bars(f"whether {name} stands out is not known; no null was drawn for it.")
    draws, strong, p = rank
    count = (
        f"{strong} of {draws} draws of the null (in each layer a random one of {_family(change.null_of)}) "
        f"are as strong or stronger{'' if math.isnan(p) else f', p = {figure(p)}'}"
    )
    if strong / draws > RARE:
        return reading.bars(f"{name} does not stand out; {count}.")
    if draws < ENOUGH:
        return reading.bars(
            f"whether {name} stands out is open; {count}, and {draws} draws make a picture, not a test."
        )
    return reading.allows(f"{name} stands out; {count}.")


def _attention_or_gate(reading: Reading) -> Iterator[Said]:
    sign, by_role = reading.sign, {one.role: one for one in reading.parts("transplant")}
    gate = reading.gate
    attention = [by_role[role] for role in ATTENTION if role in by_role]
    if gate is None or not attention:
        return
    rival = max(attention, key=lambda one: sign * one.effect)
    pair = f"{_measured(rival)} against {_measured(gate)}"
    if not (rival.clear or gate.clear):
        yield reading.bars(f"attention and the gate can't be told apart ({rival.role} {pair} for gate_proj).")
        return
    first, second = (
        ("attention", "the gate") if sign * rival.effect > sign * gate.effect else ("the gate", "attention")
    )
    named = f"attention's best, {rival.role}: {_measured(rival)}; gate_proj: {_measured(gate)}"
    if apart(rival, gate):
        words = f"attention ({rival.role}) matters" if first == "attention" else "the gate matters"
        yield reading.allows(f"{words} more than {second} here ({named}).")
    else:
        yield reading.bars(
            f"that {first} matters more than {second} is open, since their intervals overlap ({named})."
        )


def _blocks(reading: Reading) -> Iterator[Said]:
    """Hold attention as a whole against the MLP as a whole, with what each is made of."""
    both = [reading.outcome.change("transplant", name) for name in ("attention", "mlp")]
    attention, mlp = both
    if attention is None or mlp is None:
        return
    sizes = [f"{one.size:,.0f} parameters, {_measured(one)}" for one in (attention, mlp)]
    pair = f"attention as a whole ({sizes[0]}) and the MLP as a whole ({sizes[1]})"
    if not apart(attention, mlp):
        yield reading.bars(f"{pair}, put into base, can't be told apart: their intervals overlap.")
        return
    ahead = reading.sign * attention.effect > reading.sign * mlp.effect
    yield reading.allows(f"of {pair}, put into base, {'attention' if ahead else 'the MLP'} does more.")


def _necessary(reading: Reading) -> Iterator[Said]:
    if not reading.parts("revert"):
        return
    best = reading.best("revert")
    if best is None or not best.clear:
        yield reading.bars(
            f"no single {reading.kind} set back in tuned had an effect that this data could see."
        )
        return
    yield reading.allows(f"set back to base in tuned, {best.name} costs most ({_measured(best)}).")
    first = reading.best("transplant")
    if first is not None and first.clear and first.group != best.group:
        yield reading.bars(
            f"sufficient and necessary are not the same {reading.kind} here ({first.name} gives "
            f"most, {best.name} costs most)."
        )


def _unseen(reading: Reading) -> Iterator[Said]:
    for action, words in (("transplant", "put into base"), ("revert", "set back in tuned")):
        changes = reading.parts(action)
        names = [one.name for one in changes if not one.clear]
        if names and len(names) < len(changes):
            yield reading.bars(f"{listed(names)} {words} had no effect that this data could see.")


def _gap(reading: Reading, gain: Change) -> Iterator[Said]:
    for action, words in (("transplant", "put into base"), ("revert", "set back in tuned")):
        parts = _partition(reading, action, gain=gain)
        if len(parts) < 2:
            continue
        total, covered = sum(one.effect for one in parts), sum(one.size for one in parts) / gain.size
        whole = -gain.effect if action == "revert" else gain.effect
        rest = (
            f" (what else moved, {percent(1 - covered)} of the parameters, included)"
            if covered < 0.9999
            else ""
        )
        yield reading.allows(
            f"the {len(parts)} {reading.kind}s {words} one at a time sum to {signed(total)}, the whole "
            f"change makes {signed(whole)}: an interaction gap of {signed(whole - total)}{rest}."
        )
    best = reading.best("transplant")
    back = reading.outcome.change("revert", best.group) if best is not None else None
    if best is not None and back is not None and best.clear:
        yield reading.allows(
            f"{best.name} gives {signed(best.effect)} alone in base; set back in tuned it "
            f"makes {signed(back.effect)}."
        )


def _control(reading: Reading) -> Iterator[Said]:
    shown = {one.group: one for one in (reading.best("transplant"), reading.gate) if one is not None}
    for one in shown.values():
        control = reading.outcome.change("transplant", one.group, kind="control-tuning")
        if control is None:
            continue
        words = (
            f"the control tuning's change of {one.name} gives {_measured(control)}, "
            f"the affect tuning's {_measured(one)}"
        )
        if apart(control, one):
            more = reading.sign * one.effect > reading.sign * control.effect
            yield reading.allows(f"{words}: {'more' if more else 'less'} than a tuning on other data.")
        else:
            yield reading.bars(f"{words}: the intervals overlap, so it is not shown to be special to affect.")


def _measured(change: Change) -> str:
    span = f"[{change.interval}]" if change.interval else "[no interval]"
    return f"{signed(change.effect)} {span}"


def apart(one: Change, two: Change) -> bool:
    """Whether two intervals share no value."""
    return one.low > two.high or two.low > one.high


def _family(null_of: str) -> str:
    roles = {"mlp": MLP, "attention": ATTENTION}.get(null_of) or null_of.split("/")
    return listed(plain(role).removesuffix("_proj") for role in roles)


def _partition(reading: Reading, action: str, *, gain: Change) -> tuple[Change, ...]:
    """All groups if together they are all that moved, else those that stand for roles."""
    groups = reading.outcome.changes(action)
    return (
        groups if sum(one.size for one in groups) == gain.size else tuple(one for one in groups if one.role)
    )
