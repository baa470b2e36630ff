"""Bring what passes a module into the layout (batch, position, …, feature), and back.

A model passes heads before positions, streams before the batch, channels before pixels, or rows and positions
in one dimension. With four heads and four tokens, sizes don't tell one from the other, nor does the order in
memory, which a kernel may change. A module always keeps its layout, so what one pass shows holds in all
others: `learn` shows it in a short pass of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn

from affectlens.checkpoints.memory import modules_of
from affectlens.errors import LensError
from affectlens.lens.hooks.places import Place
from affectlens.lens.hooks.positions import Moment
from affectlens.lens.live import UNSEEN, answering, config_of, device_of, encodes, inner
from affectlens.lens.restoring import Swaps, interruptible

Reshape = Callable[[Tensor], Tensor]
FindMoment = Callable[[object, Sequence[int]], Moment | None]  # of a tensor with this (batch, position, …)
_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STREAMS, _BESIDE = "stream batch position feature", "batch position (stream feature)"
# The dimension of the positions at a side of a module, of (batch, …, …, feature), where a pass has shown it;
# 0 is that of (batch · position, head, feature).
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


class Layout(NamedTuple):
    """How to reshape a tensor to (batch, position, …, feature) and back; `there` is None where it is so."""

    moment: Moment | None
    there: Reshape | None = None
    back: Reshape = lambda tensor: tensor


def layout_of(tensor: Tensor, place: Place, *, module: nn.Module, moment: FindMoment) -> Layout:
    """Return the layout of a tensor that passes a place.

    Raises `LensError` where two dimensions may be the positions, and no pass has shown which one it is.
    """
    if isinstance(module, _CHANNELS_FIRST):
        moved = tensor.movedim(1, -1)
        return Layout(moment(moved, moved.shape), lambda _: moved, lambda one: one.movedim(-1, 1))
    if place.streams > 1 and tensor.ndim == 4:
        # Several residual streams in one tensor, before the batch: their features side by side.
        there = partial(rearrange, pattern=f"{_STREAMS} -> {_BESIDE}")
        back = partial(rearrange, pattern=f"{_BESIDE} -> {_STREAMS}", stream=len(tensor))
        return Layout(moment(tensor, tensor.shape[1:3]), there, back)
    if tensor.ndim == 4 and not place.stream:
        return _of_heads(tensor, place, module=module, moment=moment)
    found = moment(tensor, tensor.shape)
    # A mixture of experts, and some norms of heads, have rows and positions in one dimension.
    flat = tensor.ndim == 2 or _KNOWN.get(module, {}).get(place.side) == 0
    rows = 0 if found is None else len(found.own)
    if found is None or not flat or len(tensor) != rows * found.length:
        return Layout(found)
    shape = (rows, found.length, *tensor.shape[1:])
    return Layout(found, lambda one: one.reshape(shape), lambda one: one.flatten(0, 1))


def _of_heads(tensor: Tensor, place: Place, *, module: nn.Module, moment: FindMoment) -> Layout:
    """Return the layout of (batch, position, head, feature) or (batch, head, position, feature)."""
    own, known = moment(tensor, ()), _KNOWN.setdefault(module, {})
    # An encoder may have as many positions as a decoder has heads, so the stack's own moment comes first.
    for one in (own, moment(tensor, tensor.shape), moment(tensor, tensor.shape[::2])):
        at = () if one is None else _positions(tensor.shape, rows=len(one.own), length=one.length)
        if not at:
            continue
        if len(at) == 1:
            known[place.side] = at[0]
        if known.get(place.side) not in at:
            raise LensError(
                f"{place.module}, {place.side}: two dimensions of the shape {tuple(tensor.shape)} may be the "
                f"positions, because the model has as many heads; run a batch of another length once before"
            )
        if known[place.side] == 1:
            return Layout(one)
        return Layout(one, lambda some: some.transpose(1, 2), lambda some: some.transpose(1, 2))
    return Layout(own)


def _positions(shape: torch.Size, *, rows: int, length: int) -> tuple[int, ...]:
    """Return which dimensions of (batch, …, …, feature) have the size of the positions."""
    return tuple(dim for dim in (1, 2) if len(shape) == 4 and (shape[0], shape[dim]) == (rows, length))


@interruptible
def learn(model: nn.Module, places: Iterable[Place]) -> None:
    """Run a few tokens once, to see the dimension of the positions in norms of heads.

    Interventions and recordings don't see that pass, and it leaves no trace in the model.
    """
    names = {place.module for place in places if place.positional}
    asked = {name: module for name in names if (module := model.get_submodule(name)) not in _KNOWN}
    if not asked:
        return
    length, swaps, quiet = _unlike_heads(config_of(model)), Swaps(), UNSEEN.set(True)
    try:
        for module in modules_of(model):  # a model may note the positions of its last input
            swaps.note(partial(_put_back, module, dict(vars(module))))
            module.training = False
        for module in asked.values():
            swaps.hook(module, partial(_see, length), side="output")
        with suppress(Exception), torch.no_grad():  # a model that can't run these tokens shows it later
            _run(model, length)
    finally:
        UNSEEN.reset(quiet)
        swaps.undo()


def _see(length: int, module: nn.Module, args: tuple[Any, ...], kwargs: object, output: object) -> None:
    for side, passing in (("input", args[0] if args else None), ("output", output)):
        at = _positions(passing.shape, rows=2, length=length) if isinstance(passing, Tensor) else ()
        if isinstance(passing, Tensor) and passing.ndim == 3 and len(passing) == 2 * length:
            at = (0,)
        if len(at) == 1:
            _KNOWN.setdefault(module, {})[side] = at[0]


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    own = vars(module)
    for name in [name for name in own if name not in before]:
        del own[name]
    own.update(before)


def _unlike_heads(config: Any) -> int:
    """Return a small number of tokens that no number in the config equals."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {value for value in getattr(text, "__dict__", {}).values() if type(value) is int}
    return next(number for number in range(3, len(numbers) + 4) if number not in numbers)


def _run(model: nn.Module, length: int) -> None:
    ids = torch.ones(2, length, dtype=torch.long, device=device_of(model))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"decoder_input_ids": ids} if encodes(model) else {}
    inner(answering(model))(**batch, use_cache=False)
