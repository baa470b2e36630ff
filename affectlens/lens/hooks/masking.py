"""The attention mask that a module is called with, written out: which key each query may look at."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.hooks.moments import Moment

_ACROSS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


def mask_of(
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
    return (allowed if way == "sdpa" else added(allowed, next(module.parameters()).dtype)), moment


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


def added(allowed: Bool[Tensor, "batch head query key"], dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added to the scores: 0, or the least there is."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


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
