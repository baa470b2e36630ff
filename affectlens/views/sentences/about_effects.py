"""What the effects allow one to say of one task: gain, the best role, its null, the control, the gaps."""

import math
from collections.abc import Iterator

from affectlens.printable import plain
from affectlens.sites import ATTENTION, MLP
from affectlens.views.readings.numbers import figure, listed, percent, signed
from affectlens.views.readings.of_effects import EffectRow, Reading
from affectlens.views.sentences.about_control import at_same_sites
from affectlens.views.sentences.wording import Said, allowed, barred, joined

RARE = 0.05  # the share of null draws that may be as strong before an effect no longer stands out
ENOUGH = 999  # draws below which a rank is a picture and no test


def about_effects(reading: Reading) -> Said:
    """Say what one task shows, in the order of the argument."""
    return joined(_sentences(reading)).of(reading.task)


def _sentences(reading: Reading) -> Iterator[Said]:
    gain = reading.outcome.gain
    metric = plain(reading.outcome.metric)
    if gain is None:
        yield barred("the tuned model itself was not scored, so no share of its gain is known.")
        return
    score = f"{figure(gain.baseline)} to {figure(gain.baseline + gain.effect)}"
    if not gain.clear:
        rest = ", so there is nothing to share out among roles" if reading.outcome.leading else ""
        yield barred(
            f"tuning had no effect on {metric} that this data could see ({score}; change "
            f"{gain.measured}){rest}."
        )
        return
    verb = "raised" if gain.effect > 0 else "lowered"
    yield allowed(f"tuning {verb} {metric} from {score} (change {gain.measured}).")
    if reading.outcome.leading:
        yield from _sufficient(reading)
        yield from _attention_or_gate(reading)
        yield from _blocks(reading)
        yield from _necessary(reading)
        yield from _unseen(reading)
        yield from _gap(reading, gain)
        yield from at_same_sites(reading)


def _sufficient(reading: Reading) -> Iterator[Said]:
    best = reading.best("transplant")
    parts = reading.parts("transplant")
    if not parts:
        return
    if best is None or not best.clear:
        yield barred(f"no single {reading.kind} put into base had an effect that this data could see.")
        return
    share = f", {percent(best.recovered)} of the gain over base" if not math.isnan(best.recovered) else ""
    yield allowed(
        f"of {len(parts)} {reading.kind}s put into base one at a time, {best.name} does most "
        f"({best.measured}{share}){_though(reading, best)}."
    )
    yield _standing(reading, best)
    gate = reading.gate
    if gate is not None and gate.clear and gate.role != best.role:
        yield _standing(reading, gate)


def _though(reading: Reading, best: EffectRow) -> str:
    level = reading.no_clearer(best)
    return f", though not clearly more than {level}" if level else ""


def _standing(reading: Reading, change: EffectRow) -> Said:
    rank, name = reading.rank(change), change.name
    if rank is None:
        return barred(f"whether {name} stands out is not known; no null was drawn for it.")
    draws, strong, p = rank
    count = (
        f"{strong} of {draws} draws of the null (in each layer a random one of {_family(change.null_of)}) "
        f"are as strong or stronger{'' if math.isnan(p) else f', p = {figure(p)}'}"
    )
    if strong / draws > RARE:
        return barred(f"{name} does not stand out; {count}.")
    if draws < ENOUGH:
        return barred(
            f"whether {name} stands out is open; {count}, and {draws} draws make a picture, not a test."
        )
    return allowed(f"{name} stands out; {count}.")


def _attention_or_gate(reading: Reading) -> Iterator[Said]:
    sign, by_role = reading.sign, {one.role: one for one in reading.parts("transplant")}
    gate = reading.gate
    attention = [by_role[role] for role in ATTENTION if role in by_role]
    if gate is None or not attention:
        return
    rival = max(attention, key=lambda one: sign * one.effect)
    pair = f"{rival.measured} against {gate.measured}"
    if not (rival.clear or gate.clear):
        yield barred(f"attention and the gate can't be told apart ({rival.role} {pair} for gate_proj).")
        return
    first, second = (
        ("attention", "the gate") if sign * rival.effect > sign * gate.effect else ("the gate", "attention")
    )
    best = f"{rival.role}, best of {len(attention)} attention roles" if len(attention) > 1 else rival.role
    named = f"{best}: {rival.measured}{_size(rival)}; gate_proj: {gate.measured}{_size(gate)}"
    if rival.apart(gate):
        yield allowed(f"{first} matters more than {second} here ({named}).")
    else:
        yield barred(
            f"that {first} matters more than {second} is open, since their intervals overlap ({named})."
        )


def _size(change: EffectRow) -> str:
    return "" if math.isnan(change.size) else f", {change.size:,.0f} parameters"


def _blocks(reading: Reading) -> Iterator[Said]:
    """Hold attention as a whole against the MLP as a whole, with what each is made of."""
    both = [reading.outcome.change("transplant", name) for name in ("attention", "mlp")]
    attention, mlp = both
    if attention is None or mlp is None:
        return
    sizes = [f"{one.size:,.0f} parameters, {one.measured}" for one in (attention, mlp)]
    pair = f"attention as a whole ({sizes[0]}) and the MLP as a whole ({sizes[1]})"
    if not attention.apart(mlp):
        yield barred(f"{pair}, put into base: their intervals overlap, so neither is clearly ahead.")
        return
    ahead = reading.sign * attention.effect > reading.sign * mlp.effect
    yield allowed(f"of {pair}, put into base, {'attention' if ahead else 'the MLP'} does more.")


def _necessary(reading: Reading) -> Iterator[Said]:
    if not reading.parts("revert"):
        return
    best = reading.best("revert")
    if best is None or not best.clear:
        yield barred(f"no single {reading.kind} set back in tuned had an effect that this data could see.")
        return
    yield allowed(
        f"set back to base in tuned, {best.name} costs most ({best.measured}){_though(reading, best)}."
    )
    first = reading.best("transplant")
    if first is None or not first.clear or first.group == best.group:
        return
    if not reading.level(first) and not reading.level(best):
        yield barred(
            f"sufficient and necessary are not the same {reading.kind} here ({first.name} gives "
            f"most, {best.name} costs most)."
        )


def _unseen(reading: Reading) -> Iterator[Said]:
    for action, words in (("transplant", "put into base"), ("revert", "set back in tuned")):
        changes = reading.parts(action)
        names = [one.name for one in changes if not one.clear]
        if names and len(names) < len(changes):
            yield barred(f"{listed(names)} {words} had no effect that this data could see.")


def _gap(reading: Reading, gain: EffectRow) -> Iterator[Said]:
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
        yield allowed(
            f"the {len(parts)} {reading.kind}s {words} one at a time sum to {signed(total)}, the whole "
            f"change makes {signed(whole)}: an interaction gap of {signed(whole - total)}{rest}."
        )
    best = reading.best("transplant")
    costly = reading.best("revert")
    if best is None or not best.clear:
        return
    if costly is not None and best.name in (costly.name, *reading.level(costly)):
        return  # that it gives most and that it costs most, or as much, has been said
    if back := reading.outcome.change("revert", best.group):
        yield allowed(
            f"{best.name} gives {signed(best.effect)} alone in base; set back in tuned it "
            f"makes {signed(back.effect)}."
        )


def _family(null_of: str) -> str:
    roles = {"mlp": MLP, "attention": ATTENTION}.get(null_of) or null_of.split("/")
    return listed(plain(role).removesuffix("_proj") for role in roles)


def _partition(reading: Reading, action: str, *, gain: EffectRow) -> tuple[EffectRow, ...]:
    """All groups if together they are all that moved, else those that stand for roles."""
    groups = reading.outcome.changes(action)
    return (
        groups if sum(one.size for one in groups) == gain.size else tuple(one for one in groups if one.role)
    )
