"""Read what one unit of an MLP passes on: in what goes into down, or in the module's output.

answer_of ─▶ Answer.read (run the bench) ─▶ Answer.column (the unit's share of a change)
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from affectlens.probes.bench import Bench, Unprobed
from affectlens.sites import Storage


class Seen(NamedTuple):
    """A probe's verdict on one role, and the reason."""

    verdict: str
    reason: str


class Answer(NamedTuple):
    """Functions that read what a unit passes on.

    `read` runs the bench. `column` takes a change of what was read and returns the unit's share of it and, in
    words, what it moves instead (`?` where that is unclear). `check` tests the unit's column of down.
    """

    read: Callable[[], Tensor]
    column: Callable[[Tensor, int], tuple[Tensor, str]]
    check: Callable[[Storage, int], Seen]
    through: bool = False  # what was read passes a norm before down


def answer_of(bench: Bench, parts: Mapping[str, Storage]) -> Answer:
    """Read what goes into down, or the module's output where down is not a module of its own."""
    first = next(parts[role] for role in ("gate_proj", "fc1") if role in parts)
    down = next(parts[role] for role in ("down_proj", "fc2") if role in parts)
    inner, owner = down.shape[1], bench.owner(down)
    if owner not in ("", bench.owner(first)) and owner in bench.modules:
        norms = [
            name
            for name, shape in bench.order()
            if shape and shape[-1] == inner and "norm" in type(bench.modules[name]).__name__.lower()
        ]
        axis = _axis(bench, owner, inner)
        if axis is not None:
            direct = _before_down(bench, owner, owner, axis)
            # A norm before down mixes the units, so read what goes into that norm.
            if not norms or not _mixed(bench, first, direct) or _axis(bench, norms[-1], inner) is None:
                return direct
            return _before_down(bench, owner, norms[-1], axis)._replace(through=True)
    return _at_the_end(bench, down)


def spread(count: int) -> list[int]:
    """Return units at both ends and between, where a slice cut in the wrong place shows."""
    return sorted(
        {0, 1, count // 3, count // 2 - 1, count // 2, 2 * count // 3, count - 1} & set(range(count))
    )


def _mixed(bench: Bench, where: Storage, answer: Answer) -> bool:
    """Return whether a unit moves more than two columns, as it does where a norm mixes them."""
    for unit in spread(where.shape[0]):
        with bench.scaled(bench.row(where, unit), 2.0):
            more = answer.read()
        change = more - answer.read()
        size = change.abs().flatten(0, -2).amax(0)
        if float(size.max()) > 1e-6 * float(more.abs().max()):
            return int((size > 0.01 * size.max()).sum()) > 2
    return False


def _axis(bench: Bench, watch: str, inner: int) -> int | None:
    """Return the axis of the `inner` channels in a module's input; None if it has no such axis."""
    try:
        shape = bench.run(watch).shape
    except Unprobed:
        return None
    convolves = (
        "Conv" in type(bench.modules[watch]).__name__ and "1D" not in type(bench.modules[watch]).__name__
    )
    axis = 1 if convolves and len(shape) > 2 else len(shape) - 1
    return axis if shape[axis] == inner else None


def _before_down(bench: Bench, owner: str, watch: str, axis: int) -> Answer:
    def read() -> Tensor:
        return bench.run(watch).movedim(axis, -1)

    def column(change: Tensor, unit: int) -> tuple[Tensor, str]:
        own = change[..., unit]
        size = change.abs().flatten(0, -2).amax(0)
        best = int(size.argmax())
        if best != unit and size[best] > 30 * size[unit]:
            many = int((size > 0.01 * size[best]).sum())
            if many <= 2:
                return own, f"moves column {best} of what goes into down instead of its own"
            return own, "?"
        return own, "?" if (size > 0.01 * size[unit]).sum() > 1 else ""

    def check(down: Storage, unit: int) -> Seen:
        column = bench.column(down, unit)
        before = bench.run(owner, side="output")
        goes_in = bench.run(owner).movedim(axis if owner == watch else _last(bench, owner), -1)[..., unit]
        with bench.scaled(column, 0.0):
            change = before - bench.run(owner, side="output")
        change = change.movedim(axis, -1) if change.ndim == goes_in.ndim + 1 else change
        weights = bench.values(down)
        weights = weights.flatten(1)[:, unit] if weights.ndim > 2 else weights[:, unit]
        expected = goes_in[..., None] * weights
        rows = change.abs().amax(-1) > 1e-6 * change.abs().max()
        if change.shape != expected.shape or not expected.abs().max() > 1e-4 * before.abs().max():
            return Seen("unverified", f"its column {unit} has no effect")
        # Only the tokens that chose an expert pass through its down.
        gap = (change - expected)[rows].abs().max() / expected[rows].abs().max().clamp_min(1e-30)
        if gap < 1e-2:
            return Seen("confirmed", "its columns take the units that the matrices before it give")
        kind = type(bench.modules[owner]).__name__
        if kind in ("Linear", "Conv1D"):
            return Seen("refuted", f"column {unit} does not carry unit {unit}")
        return Seen("unverified", f"{kind} is not a plain matrix product")

    return Answer(read, column, check)


def _last(bench: Bench, owner: str) -> int:
    return (
        1
        if type(bench.modules[owner]).__name__.startswith("Conv")
        and "1D" not in type(bench.modules[owner]).__name__
        else -1
    )


def _at_the_end(bench: Bench, down: Storage) -> Answer:
    """Read the module's output, in which a unit moves every token along its column of down."""
    weights = bench.values(down)
    weights = weights / weights.norm(dim=0).clamp_min(1e-30)
    base = bench.run()
    if weights.ndim != 2 or weights.shape[0] != base.shape[-1]:
        raise Unprobed("the output differs from down in width")

    def column(change: Tensor, unit: int) -> tuple[Tensor, str]:
        flat = change.flatten(0, -2)
        along = flat @ weights[:, unit]
        rest = flat - along[:, None] * weights[:, unit]
        if rest.norm() < 1e-2 * flat.norm():
            return along, ""
        strongest = flat[flat.norm(dim=1).argmax()]
        match = (strongest @ weights).abs() / strongest.norm()
        best = int(match.argmax())
        if best != unit and match[best] > 0.9999:
            return along, f"belongs to column {best} of down instead of its own"
        return along, "?"

    def check(_: Storage, unit: int) -> Seen:
        # `column` has compared the output's direction with that column already.
        return Seen("confirmed", "its units move the output along its columns")

    return Answer(bench.run, column, check)
