"""Say what the effects show on one task: the gain, the best role, its null, attention and MLP, the gap."""

import math
from collections.abc import Iterator

from affectlens.printable import plain
from affectlens.sites import ATTENTION, MLP
from affectlens.views.readings.numbers import figure, listed, percent, signed
from affectlens.views.readings.of_effects import EffectRow, Reading
from affectlens.views.sentences.about_control import at_same_sites
from affectlens.views.sentences.wording import ENOUGH, RARE, Said, allowed, barred, joined


def about_effects(reading: Reading) -> Said:
    """Say what one task shows, in the order of the argument."""
    return joined(_sentences(reading)).of(reading.task)


def _sentences(reading: Reading) -> Iterator[Said]:
    gain = reading.outcome.gain
    metric = plain(reading.outcome.metric)
    if gain is None:
        yield barred("the tuned model itself was not scored, so shares of its gain are unknown.")
        return
    score = f"{figure(gain.baseline)} to {figure(gain.baseline + gain.effect)}"
    if not gain.clear:
        rest = ", so there is no gain to divide among roles" if reading.outcome.leading else ""
        yield barred(f"no effect of tuning on {metric} was detected ({score}; change {gain.measured}){rest}.")
        return
    verb = "raised" if gain.effect > 0 else "lowered"
    yield allowed(f"tuning {verb} {metric} from {score} (change {gain.measured}).")
    # The gain is divided on affective tasks with new examples only: elsewhere a leading role means little.
    if reading.outcome.leading:
        yield from _sufficient(reading)
        yield from _attention_or_gate(reading)
        yield from _blocks(reading)
        yield from _necessary(reading)
        yield from _undetected(reading)
        yield from _gap(reading, gain)
        yield from at_same_sites(reading)


def _sufficient(reading: Reading) -> Iterator[Said]:
    best = reading.best("transplant")
    parts = reading.parts("transplant")
    if not parts:
        return
    if best is None or not best.clear:
        yield barred(f"no effect of transplanting any single {reading.kind} into base was detected.")
        return
    share = f"; {percent(best.recovered)} of the gain over base" if not math.isnan(best.recovered) else ""
    yield allowed(
        f"of {len(parts)} {reading.kind}s transplanted into base one at a time, {best.name} recovers the "
        f"largest part of the gain ({best.measured}{share}){_not_clearly(reading, best)}."
    )
    yield _against_null(reading, best)
    gate = reading.gate
    if gate is not None and gate.clear and gate.role != best.role:
        yield _against_null(reading, gate)


def _not_clearly(reading: Reading, best: EffectRow) -> str:
    level = reading.no_clearer(best)
    return f", though not clearly more than {level}" if level else ""


def _against_null(reading: Reading, change: EffectRow) -> Said:
    rank, name = reading.rank(change), change.name
    if rank is None:
        return barred(f"whether {name} exceeds its null is unknown: no null was drawn for it.")
    draws, strong, p = rank
    count = (
        f"its effect is matched or exceeded by {strong} of {draws} null draws (each layer: a random one of "
        f"{_family(change.null_of)}){'' if math.isnan(p) else f', p = {figure(p)}'}"
    )
    if strong / draws > RARE:
        return barred(f"{name} does not exceed its null: {count}.")
    if draws < ENOUGH:
        return barred(
            f"whether {name} exceeds its null is open: {count}, but {draws} draws are too few to test it."
        )
    return allowed(f"{name} exceeds its null: {count}.")


def _attention_or_gate(reading: Reading) -> Iterator[Said]:
    sign, by_role = reading.sign, {one.role: one for one in reading.parts("transplant")}
    gate = reading.gate
    attention = [by_role[role] for role in ATTENTION if role in by_role]
    if gate is None or not attention:
        return
    rival = max(attention, key=lambda one: sign * one.effect)
    best = f"{rival.role}, best of {len(attention)} attention roles" if len(attention) > 1 else rival.role
    named = f"{best}: {rival.measured}{_size(rival)}; gate_proj: {gate.measured}{_size(gate)}"
    if not (rival.clear or gate.clear):
        yield barred(
            f"the best attention role and gate_proj can't be told apart: no effect of either was detected "
            f"({named})."
        )
        return
    first, second = "the best attention role", "gate_proj"
    if sign * rival.effect <= sign * gate.effect:
        first, second = second, first
    if rival.apart(gate):
        yield allowed(f"{first} recovers more of the gain than {second} ({named}).")
    else:
        yield barred(
            f"whether {first} recovers more of the gain than {second} is open: their intervals overlap "
            f"({named})."
        )


def _size(change: EffectRow) -> str:
    return "" if math.isnan(change.size) else f", {change.size:,.0f} parameters"


def _blocks(reading: Reading) -> Iterator[Said]:
    attention, mlp = (reading.outcome.change("transplant", name) for name in ("attention", "mlp"))
    if attention is None or mlp is None:
        return
    named = f"{attention.measured}{_size(attention)}; the MLP: {mlp.measured}{_size(mlp)}"
    if not attention.apart(mlp):
        yield barred(
            f"transplanted into base, all of attention and the whole MLP have overlapping intervals, so "
            f"neither clearly recovers more of the gain (attention: {named})."
        )
        return
    first, second = "all of attention", "the whole MLP"
    if reading.sign * attention.effect <= reading.sign * mlp.effect:
        first, second = second, first
    yield allowed(
        f"transplanted into base, {first} recovers more of the gain than {second} (attention: {named})."
    )


def _necessary(reading: Reading) -> Iterator[Said]:
    parts = reading.parts("revert")
    if not parts:
        return
    best = reading.best("revert")
    if best is None or not best.clear:
        yield barred(f"no effect of reverting any single {reading.kind} in tuned was detected.")
        return
    yield allowed(
        f"of {len(parts)} {reading.kind}s reverted in tuned one at a time, {best.name} undoes the largest "
        f"part of the gain ({best.measured}){_not_clearly(reading, best)}."
    )
    first = reading.best("transplant")
    if first is None or not first.clear or first.group == best.group:
        return
    if not reading.level(first) and not reading.level(best):
        yield barred(
            f"no single {reading.kind} leads both ways: {first.name} recovers the largest part when "
            f"transplanted, {best.name} undoes the largest part when reverted."
        )


def _undetected(reading: Reading) -> Iterator[Said]:
    for action, words in (("transplant", "transplanting {} into base"), ("revert", "reverting {} in tuned")):
        changes = reading.parts(action)
        names = [one.name for one in changes if not one.clear]
        if names and len(names) < len(changes):
            yield barred(f"no effect of {words.format(listed(names, 'or'))} was detected.")


def _gap(reading: Reading, gain: EffectRow) -> Iterator[Said]:
    for action, words in (("transplant", "transplanted into base"), ("revert", "reverted in tuned")):
        parts = _partition(reading, action, gain=gain)
        if len(parts) < 2:
            continue
        total, covered = sum(one.effect for one in parts), sum(one.size for one in parts) / gain.size
        whole = -gain.effect if action == "revert" else gain.effect
        rest = (
            f", which includes what else moved ({percent(1 - covered)} of the parameters)"
            if covered < 0.9999
            else ""
        )
        yield allowed(
            f"the effects of the {len(parts)} {reading.kind}s {words} one at a time sum to {signed(total)}, "
            f"that of the whole change is {signed(whole)}: an interaction gap of {signed(whole - total)}"
            f"{rest}."
        )
    best = reading.best("transplant")
    costly = reading.best("revert")
    if best is None or not best.clear:
        return
    if costly is not None and best.name in (costly.name, *reading.level(costly)):
        return  # an earlier sentence says already that it also leads, or shares the lead, when reverted
    if back := reading.outcome.change("revert", best.group):
        yield allowed(
            f"{best.name} has an effect of {signed(best.effect)} when transplanted into base and of "
            f"{signed(back.effect)} when reverted in tuned."
        )


def _family(null_of: str) -> str:
    roles = {"mlp": MLP, "attention": ATTENTION}.get(null_of) or null_of.split("/")
    return listed(plain(role).removesuffix("_proj") for role in roles)


def _partition(reading: Reading, action: str, *, gain: EffectRow) -> tuple[EffectRow, ...]:
    # Groups that overlap, such as attention beside q_proj, must not be summed: then only the roles are.
    groups = reading.outcome.changes(action)
    return (
        groups if sum(one.size for one in groups) == gain.size else tuple(one for one in groups if one.role)
    )
