"""Rewrite the activations or the attention mask that pass a place.

activations ──▶ features of the point ──▶ rewrite(values, moment) ──▶ new values at the chosen positions
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
from affectlens.lens.hooks.moments import Moments
from affectlens.lens.hooks.places import Place
from affectlens.lens.hooks.positions import Moment
from affectlens.lens.live import UNSEEN
from affectlens.lens.restoring import refuse_copy
from affectlens.sites import Point

# From the values at a point, (batch, position, feature) where it has positions, and the moment, to new values
# of the same shape; the same tensor object means 'no change'. A mask is (batch, 1, query, key).
Rewrite = Callable[[Tensor, Moment | None], Tensor]
_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CROSS_STATES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


@runtime_checkable
class Beginning(Protocol):
    """A rewrite with a state that it resets at the start of each forward pass of the model."""

    def begin(self) -> None:
        """Reset the state: a new forward pass has begun."""
        ...


@dataclass(eq=False)
class Hook:
    """A rewrite at a place, callable as a hook of torch.

    `reached` counts the calls in which the point's span had at least one position.
    """

    point: Point
    place: Place
    rewrite: Rewrite
    moments: Moments
    always: bool = False  # call the rewrite even where no position of the span passes
    reached: int = 0
    _pass: int = 0
    _channels_first: bool = False  # (batch, channel, …), as around a convolution

    __reduce_ex__ = refuse_copy

    def __post_init__(self) -> None:
        if self.point.span is not None and not self.place.positional:
            raise LensError(
                f"{self.point!r}: the {self.point.site.tower} tower has no text positions; leave out the span"
            )

    @property
    def side(self) -> str:
        """When the hook runs: before the module ("input") or after it ("output")."""
        return "output" if self.place.side == "output" else "input"

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], *output: Any) -> Any:
        """Return the new output or the new input of a module; None where nothing changes."""
        if UNSEEN.get() or self.moments.ignores:
            return None
        if self.moments.passes != self._pass:
            self._pass = self.moments.passes
            counting: object = self.rewrite
            if isinstance(counting, Beginning):
                counting.begin()
        self._channels_first = isinstance(module, _CHANNELS_FIRST)
        if self.place.side == "mask":
            args, kwargs = _mask_as_keyword(module, args, kwargs)
            moment = self._moment(kwargs.get("hidden_states", *args[:1]))
            mask, moment = _mask_of(module, kwargs, moment=moment, encoder=self.moments.encoder)
            new = self.rewrite(mask, moment)
            self.reached += new is not mask
            return None if new is mask else (args, {**kwargs, "attention_mask": new})
        if output:
            return self._within(output[0])
        if args:
            new = self._within(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        for name, value in kwargs.items():  # some modules are called with keywords alone
            if isinstance(value, Tensor) and value.is_floating_point():
                new = self._within(value)
                return None if new is None else (args, {**kwargs, name: new})
        raise LensError(f"{self.point!r}: the input of this module has no floating-point tensor")

    def _within(self, value: Any) -> Any:
        """Rewrite the first tensor of a value, which may be nested in tuples; None where nothing changes."""
        if isinstance(value, Tensor):
            new = self._changed(value)
            return None if new is value else new
        if isinstance(value, tuple | list) and value:
            first = self._within(value[0])
            return None if first is None else type(value)((first, *value[1:]))
        raise LensError(f"{self.point!r}: a {type(value).__name__} passes there, not a tensor")

    def _changed(self, tensor: Tensor) -> Tensor:
        """Rewrite a tensor in the layout (batch, position, …, feature), and restore its own layout."""
        if not tensor.is_floating_point():
            raise LensError(f"{self.point!r}: {tensor.dtype} passes there, not a floating-point tensor")
        if self._channels_first:
            new = self._features(tensor.movedim(1, -1), None)
            return new.movedim(-1, 1)
        moment = self._moment(tensor)
        if self.point.kind == "residual" and tensor.ndim == 4 and moment is not None:
            if tuple(tensor.shape[:2]) != (len(moment.own), moment.length):
                raise LensError(
                    f"{self.point!r}: several residual streams pass, in shape {tuple(tensor.shape)}, and the "
                    f"first dimension is not the batch; choose another point"
                )
            return self._features(tensor, moment)
        if moment is not None and tensor.ndim == 4 and _heads_first(tensor, moment.length):
            # (batch, head, position, feature)
            heads_first = tensor.transpose(1, 2)
            new = self._features(heads_first, moment)
            return tensor if new is heads_first else new.transpose(1, 2)
        # A mixture of experts flattens rows and positions into one dimension.
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

    def _moment(self, passing: object) -> Moment | None:
        """Return the moment of a tensor: of its last positions alone, where the model dropped the others."""
        if not self.place.positional or not isinstance(passing, Tensor):
            return None
        moment = self.moments.now(self.place.stack, passing.shape)
        if moment is None or passing.ndim != 3 or len(passing) != len(moment.own):
            return moment
        return moment.tail(passing.shape[1]) if passing.shape[1] < moment.length else moment

    def _features(self, tensor: Tensor, moment: Moment | None) -> Tensor:
        """Rewrite the features that belong to the point."""
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
        """Rewrite the values at the positions of the span, and keep the others."""
        chosen = None
        if self.point.span is not None:
            if moment is None or values.shape[:2] != (len(moment.own), moment.length):
                raise LensError(
                    f"{self.point!r}: activations of shape {tuple(values.shape)} have no token positions; "
                    f"leave out the span"
                )
            chosen = moment.chosen(self.point.span)
            if not self.always and not moment.some(self.point.span):
                return values  # not counted in `reached`, so that the block can warn of an idle point
        self.reached += 1
        new = self.rewrite(values, moment)
        if new is values:
            return values
        if new.shape != values.shape:
            raise LensError(
                f"{self.point!r}: the activations have shape {tuple(values.shape)}, "
                f"the new values {tuple(new.shape)}"
            )
        new = new.to(device=values.device, dtype=values.dtype)
        return new if chosen is None else torch.where(spread(chosen, values), new, values)


def _heads_first(tensor: Tensor, length: int) -> bool:
    """Return whether a tensor of four dimensions is (batch, head, position, feature)."""
    first, second = tensor.shape[1:3]
    if first == second == length:  # a projection writes the heads of one position side by side
        return tensor.stride(1) < tensor.stride(2)
    return first != length == second


def without(mask: Tensor, blocked: Bool[Tensor, "batch query key"]) -> Tensor:
    """Return the mask with some pairs of query and key blocked.

    Raises `LensError` where the mask has fewer keys than `blocked`.

    >>> mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    >>> without(mask, torch.tensor([[[False, False], [True, False]]])).int().tolist()
    [[[[1, 1], [0, 1]]]]
    """
    more = mask.shape[-1] - blocked.shape[-1]
    if more < 0:
        raise LensError(
            f"the mask has {mask.shape[-1]} keys, but {blocked.shape[-1]} positions were selected"
        )
    # A cache of fixed size reserves keys for tokens to come.
    blocked = torch.nn.functional.pad(blocked, (0, more))[:, None].to(mask.device)
    if mask.dtype == torch.bool:
        return mask & ~blocked
    return torch.where(blocked, torch.finfo(mask.dtype).min, mask)


def _mask_as_keyword(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a call with the mask among the keywords: some layers pass it by position."""
    names = list(inspect.signature(module.forward).parameters)
    at = names.index("attention_mask") if "attention_mask" in names else len(args)
    if at >= len(args):
        return args, kwargs
    return args[:at], {**dict(zip(names[at:], args[at:], strict=False)), **kwargs}


def _mask_of(
    module: nn.Module, kwargs: Mapping[str, Any], *, moment: Moment | None, encoder: Moment | None
) -> tuple[Tensor, Moment]:
    """Return the mask of a call, (batch, 1, query, key), and the moment with the positions of its keys.

    The mask is bool (true: may be seen), or float and added to the scores. A model passes None for 'every
    key' or 'every key so far', which this writes out. Raises `LensError` for an attention with another kind
    of mask, and where queries or keys have no text positions.
    """
    mask, name = kwargs.get("attention_mask"), type(module).__name__
    way = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
    if moment is None:
        raise LensError(f"{name} runs without tokens, so a knockout finds no positions")
    if moment.blind:
        raise LensError(moment.blind)
    across = any(kwargs.get(other) is not None for other in _CROSS_STATES)
    if across and encoder is None:
        raise LensError(f"{name} attends to the output of another tower, which has no text positions")
    keys, first = _keys(module, kwargs, moment)
    moment = replace(moment, across=encoder if across else None, first_key=0 if across else first)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        _refuse_reversed(mask, moment, name=name)
        return mask, moment
    if mask is not None or way not in ("eager", "sdpa"):
        raise LensError(
            f"{name} uses {way} attention without a mask of queries and keys; load the model with sdpa or "
            f"eager attention"
        )
    there = encoder.length if across and encoder is not None else keys
    hidden = kwargs.get("hidden_states")  # in a spread model on another device than the tokens
    device = hidden.device if isinstance(hidden, Tensor) else moment.own.device
    allowed = torch.ones(moment.length, there, dtype=torch.bool, device=device)
    if not across and getattr(module, "is_causal", True):
        allowed = allowed.tril(moment.start - first)
    allowed = allowed.expand(len(moment.own), 1, -1, -1)
    return (allowed if way == "sdpa" else _added(allowed, next(module.parameters()).dtype)), moment


def _keys(module: nn.Module, kwargs: Mapping[str, Any], moment: Moment) -> tuple[int, int]:
    """Return the number of keys and the position of the first one: a sliding cache has dropped some."""
    cache, layer = kwargs.get("past_key_values"), getattr(module, "layer_idx", None)
    there = moment.start + moment.length
    if cache is None or layer is None or not hasattr(cache, "get_mask_sizes"):
        return there, 0
    try:
        keys, first = cache.get_mask_sizes(moment.length, layer)
    except ValueError:  # a layer that shares the keys of another layer has no entry in the cache
        mask = kwargs.get("attention_mask")
        keys = mask.shape[-1] if isinstance(mask, Tensor) and mask.ndim == 4 else there
        first = max(0, there - keys)
    return int(keys), int(first)


def _refuse_reversed(mask: Tensor, moment: Moment, *, name: str) -> None:
    """Raise `LensError` for a mask in which true means 'hidden', as in MPT.

    In a mask where true means 'seen', every token sees itself.
    """
    if mask.dtype != torch.bool or moment.across is not None:
        return
    itself = mask.diagonal(offset=moment.start - moment.first_key, dim1=-2, dim2=-1)[:, 0]
    if bool((moment.chosen(None).to(mask.device) & ~itself).any()):
        raise LensError(
            f"{name} uses true for hidden keys in its mask, so a knockout would do the opposite; "
            f"it is not supported"
        )


def _added(allowed: Bool[Tensor, "batch head query key"], dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add to the scores: 0, or the lowest number of the dtype."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )
