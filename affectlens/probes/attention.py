"""Probe an attention: change a channel of q, k or v at one token, and see which tokens' outputs move.

q moves only that token's output. v moves other tokens' outputs too, all on one curve, each by its attention
weight. k moves other tokens' outputs on different curves, since each query has a softmax of its own.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from affectlens.probes.bench import Bench, Unprobed, place
from affectlens.probes.feed_forward import BENT, STRAIGHT
from affectlens.probes.responses import Seen
from affectlens.sites import Storage

_STEPS = (-1.0, 1.0, 2.0)
# Sizes of the change, in units of the root mean square of the projection's output.
_SIZES, _FAR = (3.0, 100.0), (1e4, 1e7)
_MANY = 5  # channels that have to agree where a single one could be an accident
_TOKEN = 1  # the token to change; under a causal mask the first one sees only itself


class _Look(NamedTuple):
    """Where to read effects: the input of a module (None: the whole output), and its layout."""

    module: str | None
    shape: tuple[int, ...] | None
    convolves: bool = False  # channels before tokens


class _Channel(NamedTuple):
    """The position of one channel in a projection's output, and the output's usual size."""

    axis: int
    along: int
    row: int
    size: float


class _Before(NamedTuple):
    """The values before any change, and where they are read."""

    base: Tensor
    look: _Look


def probe_attention(bench: Bench, parts: Mapping[str, Storage]) -> dict[str, Seen]:
    """Probe the roles of `parts`; raise `Unprobed` where the module does not run alone."""
    out = parts.get("o_proj")
    seen: dict[str, Seen] = {}
    kinds: dict[str, dict[int, str]] = {}
    for role, where in parts.items():
        if role != "o_proj":
            try:
                kinds[role] = _channels(bench, role, where, _looks(bench, parts, out))
            except Unprobed as why:
                seen[role] = Seen("unverified", str(why))
    for role in kinds:
        seen[role] = _verdict(bench, role, kinds)
        if seen[role].verdict == "confirmed" and not _row_is_whole(bench, parts[role]):
            seen[role] = Seen("refuted", "its rows are not rows of the projection: it is stored transposed")
    if out is not None:
        seen["o_proj"] = _output(bench, out, [one.verdict for one in seen.values()])
    return seen


# How a channel acts: `d` moves all channels of its head, as both k and v do in some attentions.
_ACTS = {"q": "as q does", "k": "as k does", "v": "as v does", "g": "as an output gate does",
         "d": "on all channels of its head, on one curve"}  # fmt: skip


_BECAUSE = {"q": "only its own token moves", "k": "tokens move, each on its own curve",
            "v": "tokens move, all on one curve"}  # fmt: skip


def _verdict(bench: Bench, role: str, kinds: Mapping[str, Mapping[int, str]]) -> Seen:
    claimed = role[0]
    alive = {channel: kind for channel, kind in kinds[role].items() if kind}
    everywhere = {kind for found in kinds.values() for kind in found.values()}
    if not alive:
        return Seen("unverified", "no tried channel has an effect")
    if not everywhere & {"k", "v", "d"}:
        return Seen("unverified", "no token attends to another on this input")
    wrong = {channel: kind for channel, kind in alive.items() if kind not in (claimed, "?", "d")}
    # A head may attend to its own token alone. Its values then move no other token, so a few channels of v
    # may act like q. No channel of q may act like v.
    own = [channel for channel, kind in wrong.items() if kind in "qg"]
    if (claimed == "v" and (len(own) < len(alive) or len(own) < _MANY)) or bench.recurs:
        wrong = {channel: kind for channel, kind in wrong.items() if channel not in own}
    if wrong and bench.mixes:
        return Seen("unverified", "a convolution mixes tokens here")
    if wrong and not {name[0] for name in kinds} >= {"k", "v"}:
        return Seen("unverified", "without k and v beside it, its effect is ambiguous")
    if wrong:
        channel, kind = next(iter(wrong.items()))
        what = f"acts {_ACTS[kind]} ({len(wrong)} of {len(alive)} tried channels)"
        return Seen("refuted", f"channel {channel} of {role} {what}")
    # Without a softmax keys are on one curve too, as values are; a norm spreads values over channels. Only
    # if the other of k and v is clear can this one be told from it.
    other = {"k": "v", "v": "k"}.get(claimed, "")
    clear = other in everywhere and "d" not in {
        kind for name, found in kinds.items() if name[0] == other for kind in found.values()
    }
    if "d" in alive.values() and not clear:
        return Seen("unverified", "k and v act alike here")
    if not {claimed, "d"} & set(alive.values()):
        return Seen("unverified", "its effect is unclear")
    return Seen("confirmed", _BECAUSE[claimed])


def _looks(bench: Bench, parts: Mapping[str, Storage], out: Storage | None) -> list[_Look]:
    """Return where to read effects: before a norm that precedes o, else before o, else the whole output."""
    looks: list[_Look] = []
    shape: tuple[int, ...] | None = None
    if out is not None and bench.owner(out) in bench.modules and bench.owner(out):
        name = bench.owner(out)
        try:
            shape = tuple(bench.run(name).shape)
            looks.append(_Look(name, shape, isinstance(bench.modules[name], nn.Conv1d)))
        except Unprobed:
            pass
    if shape is not None:
        order = [(n, s) for n, s in bench.order() if s]
        last = max((i for i, (n, _) in enumerate(order) if n in _owners(bench, parts)), default=0)
        stop = next((i for i, (n, _) in enumerate(order) if n == bench.owner(out)), len(order)) if out else 0
        for name, size in order[last + 1 : stop]:
            kind = type(bench.modules[name]).__name__.lower()
            leaf = name.rpartition(".")[2]
            if (
                "norm" in kind
                and torch.Size(size).numel() == torch.Size(shape).numel()
                and leaf[:1] not in "qkv"
            ):
                looks.insert(0, _Look(name, shape))
                break
    return looks or [_Look(None, None)]


def _owners(bench: Bench, parts: Mapping[str, Storage]) -> set[str]:
    return {bench.owner(where) for role, where in parts.items() if role != "o_proj"}


def _channels(bench: Bench, role: str, where: Storage, looks: list[_Look]) -> dict[int, str]:
    """Return how each of some channels of a projection acts."""
    owner = bench.owner(where)
    if not owner or owner not in bench.modules:
        raise Unprobed("its weights have no module of their own")
    out = bench.run(owner, side="output")
    index, _ = place(where, where.shape[0] - 1)
    axis, along = _axes(bench.modules[owner], out)
    if index >= out.shape[axis]:
        raise Unprobed(f"{owner} gives only {out.shape[axis]} channels, and the site is row {index} there")
    if out.shape[along] < 2:
        raise Unprobed("there is only one token")
    look = looks[0]
    seen = _Before(_by_token(bench.run(look.module), look), look)
    if len(seen.base) < 3:
        raise Unprobed("there are fewer than three tokens")
    size = float(out.square().mean().sqrt())
    found = {}

    def kind(channel: int) -> str:
        index, _ = place(where, channel)
        return _acts_as(bench, owner, _Channel(axis, along, index, size), seen, role[0])

    for channel in _spread(where):
        found[channel] = kind(channel)
        if found[channel] not in ("", "?", "d", role[0]):
            # A slice cut in the wrong place is off by more than one channel; a single odd one is an accident.
            beside = channel + 1 if channel + 1 < where.shape[0] else channel - 1
            if kind(beside) != found[channel]:
                found[channel] = "?"
    return found


def _acts_as(bench: Bench, owner: str, where: _Channel, seen: _Before, claimed: str) -> str:
    """Return how a channel acts: a key of `_ACTS`, `?` where that is unclear, nothing for a dead one."""
    kind = ""
    # A key that meets tiny queries needs a large change before a softmax shows it.
    for amount in (*_SIZES, *(_FAR if claimed == "k" else ())):
        changes = []
        for step in _STEPS:
            shift = partial(_shift, where, step * amount * where.size)
            changes.append(_by_token(bench.run(seen.look.module, edit=(owner, shift)), seen.look) - seen.base)
        kind = _kind(torch.stack(changes), float(seen.base.abs().max())) or kind
        # In a head that attends to one token alone, a key looks like q until its change is large.
        if kind == "k" or (kind in ("q", "g") and claimed != "k"):
            break
    return kind


def _shift(where: _Channel, by: float, out: Tensor) -> None:
    out.select(where.axis, where.row).select(where.along, _TOKEN).add_(by)


def _kind(change: Tensor, scale: float) -> str:
    """Return how a channel acts by the changes that it makes: steps × tokens × channels."""
    if not torch.isfinite(change).all():
        return ""
    tokens = change.abs().amax((0, 2))
    most = float(tokens.max())
    floor = max(1e-5 * scale, 1e-30)
    if not most > 10 * floor:
        return ""
    moved = tokens > max(1e-3 * most, floor)
    strong = change.abs().amax((0, 1))
    channels = strong > 1e-3 * strong.max()
    if int(moved.sum()) == 1:
        if float(tokens.topk(2).values[1]) > max(1e-6 * most, floor / 10):
            return "?"  # a key far from all queries moves other tokens only a little
        return "q" if int(channels.sum()) > 1 else "g"
    some = strong.topk(min(16, change.shape[2])).indices
    values = torch.linalg.svdvals(change[:, moved][:, :, some].permute(2, 0, 1).double())
    ratio = float((values[:, 1:].square().sum() / values.square().sum()).sqrt())
    noise = 1e-6 * scale / most
    if ratio < max(STRAIGHT, 10 * noise):
        # A value moves its own channel in each head that reads it, and never the channel beside it.
        beside = int((channels[1:] & channels[:-1]).sum())
        return "v" if 2 * beside < int(channels.sum()) else "d"
    return "k" if ratio > max(BENT, 100 * noise) else "?"


def _by_token(seen: Tensor, look: _Look) -> Tensor:
    """Lay out what was read as tokens × the rest."""
    if look.shape is not None and tuple(seen.shape) != look.shape:
        seen = seen.reshape(look.shape)
    if look.module is None or seen.ndim < 2:
        seen = seen if seen.ndim > 1 else seen[None]
    axis = seen.ndim - 1 if look.convolves else _tokens(seen)
    return seen.movedim(axis, 0).flatten(1)


def _tokens(seen: Tensor) -> int:
    """Return the axis of the tokens: the last but one, unless that is a batch of one."""
    if seen.ndim == 3 and seen.shape[1] == 1 and seen.shape[0] > 1:
        return 0
    return seen.ndim - 2


def _axes(module: nn.Module, out: Tensor) -> tuple[int, int]:
    """Return the axis of the channels, and the axis of the tokens once the channels are selected."""
    if isinstance(module, nn.Conv1d) and out.ndim == 3:
        return 1, 1
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        raise Unprobed("it is a convolution over space")
    return out.ndim - 1, _tokens(out)


def _spread(where: Storage) -> list[int]:
    """Return channels at both ends of a slice and of its parts, and between."""
    count = where.shape[0]
    part = where.cut.stop - where.cut.start if where.cut else count
    wanted = {0, 1, part - 1, part, count // 3, count // 2, 2 * count // 3 + 1, count - 2, count - 1}
    return sorted(wanted & set(range(count)))


def _row_is_whole(bench: Bench, where: Storage) -> bool:
    """Return whether zeros in a row of the site change that channel of its module and no other."""
    owner = bench.owner(where)
    index, _ = place(where, 0)
    before = bench.run(owner, side="output")
    with bench.scaled(bench.row(where, 0)[:1], 0.0):
        change = (before - bench.run(owner, side="output")).abs()
    axis, _ = _axes(bench.modules[owner], before)
    channels = change.movedim(axis, -1).flatten(0, -2).amax(0)
    return int((channels > 1e-3 * channels.max()).sum()) <= 1 or float(channels[index]) == 0


def _output(bench: Bench, where: Storage, verdicts: list[str]) -> Seen:
    owner = bench.owner(where)
    if "confirmed" not in verdicts:
        return Seen("unverified", "none of q, k and v is confirmed")
    if not owner or owner not in bench.modules:
        return Seen("unverified", "its weights have no module of their own")
    goes_in, before = bench.run(owner), bench.run(owner, side="output")
    if goes_in.shape[-1] != where.shape[1] or before.shape[-1] != where.shape[0] or len(where.shape) != 2:
        return Seen("unverified", "it is not a plain matrix product")
    weights = bench.values(where)
    for unit in sorted({0, where.shape[1] // 2, where.shape[1] - 1}):
        with bench.scaled(bench.column(where, unit), 0.0):
            change = before - bench.run(owner, side="output")
        expected = goes_in[..., unit, None] * weights[:, unit]
        gap = float((change - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if gap > 1e-2 and float(expected.abs().max()) > 1e-3 * float(before.abs().max()):
            if type(bench.modules[owner]).__name__ in ("Linear", "Conv1D"):
                return Seen("refuted", f"its column {unit} does not carry channel {unit} of its input")
            return Seen("unverified", "it is not a plain matrix product")
    return Seen("confirmed", "its columns take the heads that q, k and v make")
