"""Read and change the attention mask of a call: (batch, head, query, key), whatever the layer passes.

a call of an attention ──▶ mask_of: its mask written out, and the moment of its keys ──▶ without(pairs)
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.hooks.places import Place
from affectlens.lens.hooks.positions import Moment

_CROSS_STATES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


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


def of_heads(mask: Tensor, place: Place, *, rewrite: Callable[[Tensor], Tensor]) -> Tensor:
    """Rewrite the mask of all heads, or of the head that a place names; the same object means no change."""
    if not isinstance(place.features, range):
        return rewrite(mask)
    head = place.features.start
    own = mask[:, head : head + 1] if mask.shape[1] > 1 else mask
    new = rewrite(own)
    if new is own:
        return mask
    whole = mask.expand(-1, place.heads, -1, -1).clone()
    whole[:, head : head + 1] = new
    return whole


def mask_as_keyword(module: nn.Module, args: Any, *, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a call with the mask among the keywords: some layers pass it by position."""
    names = list(inspect.signature(module.forward).parameters)
    at = names.index("attention_mask") if "attention_mask" in names else len(args)
    if at >= len(args):
        return args, kwargs
    return args[:at], {**dict(zip(names[at:], args[at:], strict=False)), **kwargs}


def mask_of(
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
