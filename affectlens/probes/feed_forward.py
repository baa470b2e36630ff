"""Probe an MLP: the path through its activation is curved, the other one is straight.

The probe scales one unit's row by -c, 0, c and 2c. What the unit passes on is an affine function of the scale
for up, and is not for gate. Three points are too few: a sigmoid is antisymmetric around 0. Rows set to zero
can't tell gate from up at all.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from affectlens.probes.bench import Bench, Unprobed, place
from affectlens.probes.responses import Answer, Seen, answer_of, spread
from affectlens.sites import Storage

BENT, STRAIGHT = 1e-3, 1e-4  # second differences over first differences
_STEPS = (-1.0, 0.0, 1.0, 2.0)
# The sizes that the largest pre-activation is scaled to, small ones first: large ones reach the clamps that
# some models put on both paths.
_SCALES = (0.125, 1.0, 8.0, 64.0)


class Path(NamedTuple):
    """A unit's response to its scaled row: its size, its curvature and, in words, another column it moves."""

    size: float
    bend: float
    strays: str


def probe_gated(bench: Bench, parts: Mapping[str, Storage]) -> dict[str, Seen]:
    """Probe `gate_proj`, `up_proj` and `down_proj`; raise `Unprobed` if no unit responds."""
    answer = answer_of(bench, parts)
    count = min(parts[role].shape[0] for role in ("gate_proj", "up_proj"))
    found: list[dict[str, Seen]] = []
    for unit in spread(count):
        seen = _unit(bench, parts, answer, unit)
        if seen:
            found.append(seen)
    if not found:
        raise Unprobed("no tried unit has an effect")
    return {role: worst([seen[role] for seen in found if role in seen]) for role in parts}


def probe_plain(bench: Bench, parts: Mapping[str, Storage]) -> dict[str, Seen]:
    """Probe `fc1` and `fc2`, which have an activation between them; raise `Unprobed` if no unit responds."""
    answer = answer_of(bench, parts)
    wide, inner = parts["fc1"].shape[0], parts["fc2"].shape[1]
    if wide != inner:
        if wide == 2 * inner:
            return {"fc1": Seen("refuted", f"is twice as wide as fc2's input ({inner}): it holds a gate too")}
        raise Unprobed(f"fc1 gives {wide} channels and fc2 takes {inner}")
    found: list[Seen] = []
    last = Seen("unverified", "no tried unit goes into it")
    for unit in spread(wide):
        paths = [_path(bench, parts["fc1"], answer, unit, scale) for scale in _SCALES]
        alive = [path for path in paths if path is not None]
        if not alive:
            continue
        bent = next((path for path in alive if path.bend > BENT), None)
        if stray := next((path.strays for path in alive if path.strays), ""):
            found.append(Seen("refuted", f"unit {unit} {stray}"))
        elif bent is not None:
            found.append(Seen("confirmed", "an activation follows it"))
            last = worst([last, answer.check(parts["fc2"], unit)])
        elif all(path.bend < STRAIGHT for path in alive) and not answer.through:
            found.append(Seen("refuted", f"no activation follows unit {unit}: its path is affine"))
    if not found:
        raise Unprobed("no tried unit has an effect")
    return {"fc1": worst(found), "fc2": last}


def worst(seen: list[Seen]) -> Seen:
    """Return the first refutation; without one, the first confirmation; without that, the first of all."""
    for verdict in ("refuted", "confirmed"):
        for one in seen:
            if one.verdict == verdict:
                return one
    return seen[0] if seen else Seen("unverified", "no tried unit has an effect")


def _path(bench: Bench, where: Storage, answer: Answer, unit: int, scale: float) -> Path | None:
    """Scale a unit's row and return its response; None where the unit is dead."""
    rows, out = bench.row(where, unit), []
    scale = scale / _usual(bench, where, unit, rows)
    for step in _STEPS:
        with bench.scaled(rows, step * scale):
            out.append(answer.read())
    moved = max((one - out[1] for one in out), key=lambda change: float(change.abs().max()))
    floor = 1e-6 * float(torch.stack([one.abs().max() for one in out]).max())
    if not (torch.isfinite(moved).all() and float(moved.abs().max()) > 100 * floor):
        return None
    _, strays = answer.column(moved, unit)
    changes = [answer.column(one - out[1], unit)[0] for one in out]
    first = max(float(change.abs().max()) for change in changes)
    if strays and strays != "?":
        return Path(first, 0.0, strays)
    if strays or not first > 30 * floor:
        return None
    low, zero, one, two = changes
    bend = max(float((low - 2 * zero + one).abs().max()), float((zero - 2 * one + two).abs().max())) / first
    # Curvature of the size of rounding is none.
    return Path(first, bend if bend > 10 * floor / first else 0.0, "")


def _usual(bench: Bench, where: Storage, unit: int, rows: list[Tensor]) -> float:
    """Return the size of a unit's pre-activation; the norm of its weights where that can't be read."""
    index, _ = place(where, unit)
    owner = bench.owner(where)
    size = float(torch.cat([row.flatten() for row in rows]).norm())
    if owner and len(where.shape) == 2 and where.expert is None:
        try:
            out = bench.run(owner, side="output")
        except Unprobed:
            out = torch.empty(0)
        if out.ndim and index < out.shape[-1]:
            size = float(out[..., index].abs().max()) or size
    return size or 1.0


def _unit(bench: Bench, parts: Mapping[str, Storage], answer: Answer, unit: int) -> dict[str, Seen]:
    """Return the verdicts that one unit gives; none where it is dead or unclear."""
    for scale in _SCALES:
        gate = _path(bench, parts["gate_proj"], answer, unit, scale)
        up = _path(bench, parts["up_proj"], answer, unit, scale)
        if gate is None or up is None:
            continue
        strays = {"gate_proj": gate.strays, "up_proj": up.strays}
        if any(strays.values()):
            return {r: Seen("refuted", f"its unit {unit} {what}") for r, what in strays.items() if what}
        if gate.bend > BENT and up.bend < max(STRAIGHT, gate.bend / 100):
            if not _together(bench, parts, answer, unit):
                reason = f"its unit {unit} is not multiplied by the other matrix's"
                return {role: Seen("refuted", reason) for role in ("gate_proj", "up_proj")}
            return {
                "gate_proj": Seen("confirmed", "its path is curved: the activation is on it"),
                "up_proj": Seen("confirmed", "its path is affine"),
                "down_proj": answer.check(parts["down_proj"], unit),
            }
        if up.bend > BENT and gate.bend < max(STRAIGHT, up.bend / 100):
            return {
                "gate_proj": Seen("refuted", f"unit {unit}: its path is affine, and up's path is curved"),
                "up_proj": Seen("refuted", f"unit {unit}: its path is curved, and gate's path is affine"),
                "down_proj": answer.check(parts["down_proj"], unit),
            }
        if up.bend > BENT and gate.bend > BENT and not _together(bench, parts, answer, unit):
            return {"up_proj": Seen("refuted", f"unit {unit}: its path is curved, as in a plain MLP")}
    return {}


def _together(bench: Bench, parts: Mapping[str, Storage], answer: Answer, unit: int) -> bool:
    """Return whether gate and up act on each other, as factors do and summands don't."""
    rows = {role: bench.row(parts[role], unit) for role in ("gate_proj", "up_proj")}
    out = {}
    for gate in (0.0, 1.0):
        for up in (0.0, 1.0):
            with bench.scaled(rows["gate_proj"], gate), bench.scaled(rows["up_proj"], up):
                out[gate, up] = answer.read()
    mixed = out[1.0, 1.0] - out[0.0, 1.0] - out[1.0, 0.0] + out[0.0, 0.0]
    alone = max(float((out[key] - out[0.0, 0.0]).abs().max()) for key in out)
    return float(mixed.abs().max()) > BENT * alone
