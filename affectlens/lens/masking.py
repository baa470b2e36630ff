"""The attention mask that a module is called with, written out: which key each query may look at."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.moments import Moment


def mask_of(module: nn.Module, kwargs: Mapping[str, Any], *, moment: Moment | None) -> Tensor:
    """The mask of a call, (batch, 1, query, key): bool, or float that is added to the scores.

    None stands for 'all there is' or 'all that came before', and is written out as that. Raises `LensError`
    for an attention that works by another kind of mask.
    """
    mask = kwargs.get("attention_mask")
    way = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask
    if mask is not None or way not in ("eager", "sdpa") or moment is None:
        raise LensError(
            f"{type(module).__name__} attends by {way} without a mask of queries and keys; "
            f"load the model with sdpa or eager attention"
        )
    rows, keys = len(moment.own), moment.start + moment.length
    allowed = torch.ones(moment.length, keys, dtype=torch.bool, device=moment.own.device)
    if getattr(module, "is_causal", True):
        allowed = allowed.tril(moment.start)
    allowed = allowed.expand(rows, 1, -1, -1)
    dtype = next(module.parameters()).dtype
    return allowed if way == "sdpa" else added(allowed, dtype)


def added(allowed: Bool[Tensor, "batch head query key"], dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added to the scores: 0, or the least there is."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


def without(mask: Tensor, blocked: Bool[Tensor, "batch query key"]) -> Tensor:
    """The mask with some pairs of query and key kept apart."""
    more = mask.shape[-1] - blocked.shape[-1]  # a cache of fixed size has keys that are not there yet
    blocked = torch.nn.functional.pad(blocked, (0, more))[:, None].to(mask.device)
    if mask.dtype == torch.bool:
        return mask & ~blocked
    return torch.where(blocked, torch.finfo(mask.dtype).min, mask)
