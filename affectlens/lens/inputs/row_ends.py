"""Find the last tokens of each row, on whichever side the batch is padded."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def text_mask(batch: Mapping[str, Tensor], *, decodes: bool) -> Tensor | None:
    """Return the mask of the tokens that get logits, (batch, position); None where there is none.

    With `decodes`, an encoder reads `input_ids` and a decoder answers.
    """
    prefix = "decoder_" if decodes else ""
    mask, ids = batch.get(f"{prefix}attention_mask"), batch.get(f"{prefix}input_ids")
    fits = mask is not None and mask.ndim == 2 and (ids is None or mask.shape == ids.shape)
    return mask.bool() if fits and mask is not None else None


def ends_in_padding(mask: Tensor | None) -> bool:
    """Return whether a row of a mask ends in padding."""
    return mask is not None and not bool(mask[:, -1].all())


def row_ends(
    values: Float[Tensor, "batch position feature"], mask: Tensor | None, *, count: int
) -> Float[Tensor, "batch count feature"]:
    """Return the values at the last tokens of each row. A row with fewer of them begins with padding.

    >>> values = torch.arange(3.0).reshape(1, 3, 1)
    >>> row_ends(values, torch.tensor([[True, True, False]]), count=1).flatten()
    tensor([1.])
    """
    if mask is None or not ends_in_padding(mask):
        return values[:, -count:]
    # A stable sort moves padding to the front, and keeps the order of the tokens.
    order = torch.sort(mask.byte(), dim=1, stable=True).indices[:, -count:].to(values.device)
    order = order + values.shape[1] - mask.shape[1]  # prompt tuning puts virtual tokens in front
    return values[torch.arange(len(values), device=values.device)[:, None], order]
