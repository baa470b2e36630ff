"""Hooks: give what passes a place to a function, and pass on what it makes of it.

a tensor that passes ──▶ its features ──▶ rewrite(values, moment) ──▶ at the chosen positions, its features
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.hooks.activations import spread
from affectlens.lens.hooks.places import Place
from affectlens.lens.hooks.positions import Moment, Moments
from affectlens.sites import Point

# Given the values of a point, (batch, position, feature) where it has positions, and the moment: new values
# of the same shape, or the very same tensor to change nothing. An attention's mask is (batch, 1, query, key).
Rewrite = Callable[[Tensor, Moment | None], Tensor]
_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ACROSS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


@runtime_checkable
class Beginning(Protocol):
    """A rewrite that counts its calls, and begins anew with each pass of the model."""

    def begin(self) -> None:
        """Another pass has begun."""
        ...


@dataclass(eq=False)
class Hook:
    """A rewrite at a place; `reached` counts the passes in which it had something to do."""

    point: Point
    place: Place
    rewrite: Rewrite
    moments: Moments
    always: bool = False  # whether it is called also where nothing of its span passes
    reached: int = 0
    _pass: int = 0
    _turned: bool = False

    def __post_init__(self) -> None:
        if self.point.span is not None and not self.place.positional:
            raise LensError(f"{self.point!r}: the {self.point.site.tower} tower has no positions of the text")

    @property
    def side(self) -> str:
        """Where it is installed: before or after the module runs."""
        return "output" if self.place.side == "output" else "input"

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], *output: Any) -> Any:
        """The new output of a module, or its new input; None where nothing changes."""
        if self.moments.passes != self._pass:
            self._pass = self.moments.passes
            counting: object = self.rewrite
            if isinstance(counting, Beginning):
                counting.begin()
        self._turned = isinstance(module, _CHANNELS_FIRST)
        if self.place.side == "mask":
            args, kwargs = _by_name(module, args, kwargs)
            moment = self._reached(kwargs.get("hidden_states", *args[:1]))
            mask, moment = _mask_of(module, kwargs, moment=moment, encoder=self.moments.encoder)
            new = self.rewrite(mask, moment)
            self.reached += new is not mask
            return None if new is mask else (args, {**kwargs, "attention_mask": new})
        if output:
            return self._within(output[0])
        if args:
            new = self._within(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                new = self._within(value)
                return None if new is None else (args, {**kwargs, name: new})
        raise LensError(f"{self.point!r}: no tensor of real numbers goes in there")

    def _within(self, value: Any) -> Any:
        """The same value with its first tensor rewritten; None where nothing changes."""
        if isinstance(value, Tensor):
            new = self._changed(value)
            return None if new is value else new
        if isinstance(value, tuple | list) and value:
            first = self._within(value[0])
            return None if first is None else type(value)((first, *value[1:]))
        raise LensError(f"{self.point!r}: no tensor of real numbers passes there")

    def _changed(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise LensError(f"{self.point!r}: {tensor.dtype} passes there, no real numbers")
        if self._turned:  # a convolution's features are its second dimension
            new = self._features(tensor.movedim(1, -1), None)
            return new.movedim(-1, 1)
        moment = self._reached(tensor)
        if moment is not None and tensor.ndim == 4 and tensor.shape[1] != moment.length == tensor.shape[2]:
            heads_first = tensor.transpose(1, 2)
            new = self._features(heads_first, moment)
            return tensor if new is heads_first else new.transpose(1, 2)
        flat = moment is not None and tensor.ndim == 2 and len(tensor) == len(moment.own) * moment.length
        if flat and moment is not None:
            shaped = rearrange(
                tensor, "(batch position) feature -> batch position feature", position=moment.length
            )
            new = self._features(shaped, moment)
            return (
                tensor
                if new is shaped
                else rearrange(new, "batch position feature -> (batch position) feature")
            )
        return self._features(tensor, moment)

    def _reached(self, passing: Any) -> Moment | None:
        """The moment of what passes: of its last positions alone, where a model has left out the others."""
        moment = self._moment(passing)
        if moment is None or passing.ndim != 3 or len(passing) != len(moment.own):
            return moment
        return moment.tail(passing.shape[1]) if passing.shape[1] < moment.length else moment

    def _moment(self, passing: Any) -> Moment | None:
        if not self.place.positional or not isinstance(passing, Tensor):
            return None
        return self.moments.now(self.place.stack, passing.shape)

    def _features(self, tensor: Tensor, moment: Moment | None) -> Tensor:
        wanted = self.place.features
        if wanted is None:
            return self._chosen(tensor, moment)
        index = slice(wanted.start, wanted.stop, wanted.step) if isinstance(wanted, range) else list(wanted)
        values = tensor[..., index]
        new = self._chosen(values, moment)
        if new is values:
            return tensor
        whole = tensor.clone()
        whole[..., index] = new
        return whole

    def _chosen(self, values: Tensor, moment: Moment | None) -> Tensor:
        chosen = None
        if self.point.span is not None:
            if moment is None or values.shape[:2] != (len(moment.own), moment.length):
                raise LensError(
                    f"{self.point!r}: what passes there, {tuple(values.shape)}, has no positions of tokens"
                )
            chosen = moment.chosen(self.point.span)
            if not self.always and not moment.some(self.point.span):
                return values
        self.reached += 1
        new = self.rewrite(values, moment)
        if new is values:
            return values
        if new.shape != values.shape:
            raise LensError(
                f"{self.point!r}: {tuple(values.shape)} passes there, and would become {tuple(new.shape)}"
            )
        new = new.to(device=values.device, dtype=values.dtype)
        return new if chosen is None else torch.where(spread(chosen, values), new, values)


def without(mask: Tensor, blocked: Bool[Tensor, "batch query key"]) -> Tensor:
    """The mask with some pairs of query and key kept apart. Raises `LensError` where it has fewer keys."""
    more = mask.shape[-1] - blocked.shape[-1]
    if more < 0:
        raise LensError(
            f"the mask has {mask.shape[-1]} keys, and {blocked.shape[-1]} positions are spoken of"
        )
    # A cache of fixed size has keys that are not there yet.
    blocked = torch.nn.functional.pad(blocked, (0, more))[:, None].to(mask.device)
    if mask.dtype == torch.bool:
        return mask & ~blocked
    return torch.where(blocked, torch.finfo(mask.dtype).min, mask)


def _by_name(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A call with its mask by name: some layers hand it on by its place."""
    names = list(inspect.signature(module.forward).parameters)
    at = names.index("attention_mask") if "attention_mask" in names else len(args)
    if at >= len(args):
        return args, kwargs
    return args[:at], {**dict(zip(names[at:], args[at:], strict=False)), **kwargs}


def _mask_of(
    module: nn.Module, kwargs: Mapping[str, Any], *, moment: Moment | None, encoder: Moment | None
) -> tuple[Tensor, Moment]:
    """The mask of a call, (batch, 1, query, key): bool, or float that is added to the scores; and its moment.

    None stands for 'all there is' or 'all that came before', and is written out as that. Raises `LensError`
    for an attention that works by another kind of mask, or to what has no positions.
    """
    mask, name = kwargs.get("attention_mask"), type(module).__name__
    way = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
    if moment is None:
        raise LensError(f"{name} runs without tokens, so there are no positions to keep apart")
    if moment.blind:
        raise LensError(moment.blind)
    across = any(kwargs.get(other) is not None for other in _ACROSS)
    if across and encoder is None:
        raise LensError(f"{name} attends to what another tower made, which has no positions of the text")
    keys, first = _keys(module, kwargs, moment)
    moment = replace(moment, across=encoder if across else None, first_key=0 if across else first)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        _refuse_reversed(mask, moment, name=name)
        return mask, moment
    if mask is not None or way not in ("eager", "sdpa"):
        raise LensError(
            f"{name} attends by {way} without a mask of queries and keys; load the model with sdpa or eager "
            f"attention"
        )
    there = encoder.length if across and encoder is not None else keys
    hidden = kwargs.get("hidden_states")  # which may be on another device than the tokens
    device = hidden.device if isinstance(hidden, Tensor) else moment.own.device
    allowed = torch.ones(moment.length, there, dtype=torch.bool, device=device)
    if not across and getattr(module, "is_causal", True):
        allowed = allowed.tril(moment.start - first)
    allowed = allowed.expand(len(moment.own), 1, -1, -1)
    return (allowed if way == "sdpa" else _added(allowed, next(module.parameters()).dtype)), moment


def _keys(module: nn.Module, kwargs: Mapping[str, Any], moment: Moment) -> tuple[int, int]:
    """How many keys there will be, and the position of the first: a sliding cache has dropped some."""
    cache, layer = kwargs.get("past_key_values"), getattr(module, "layer_idx", None)
    there = moment.start + moment.length
    if cache is None or layer is None or not hasattr(cache, "get_mask_sizes"):
        return there, 0
    try:
        keys, first = cache.get_mask_sizes(moment.length, layer)
    except ValueError:  # a layer that uses the keys of another has none of its own
        mask = kwargs.get("attention_mask")
        keys = mask.shape[-1] if isinstance(mask, Tensor) and mask.ndim == 4 else there
        first = max(0, there - keys)
    return int(keys), int(first)


def _refuse_reversed(mask: Tensor, moment: Moment, *, name: str) -> None:
    """Raise `LensError` for a mask whose true says 'kept from': each token may look at itself."""
    if mask.dtype != torch.bool or moment.across is not None:
        return
    itself = mask.diagonal(offset=moment.start - moment.first_key, dim1=-2, dim2=-1)[:, 0]
    if bool((moment.chosen(None).to(mask.device) & ~itself).any()):
        raise LensError(f"{name} has a mask that means something else: its tokens may not see themselves")


def _added(allowed: Bool[Tensor, "batch head query key"], dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added to the scores: 0, or the least there is."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )
