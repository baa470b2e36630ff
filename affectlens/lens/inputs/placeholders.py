"""Find media in the tokens of a text, by the placeholders that the model's config names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

MEDIA = ("image", "audio", "video")
_PLACEHOLDER = re.compile(
    rf"({'|'.join(MEDIA)})_(?:token_(?:id|index)|patch_id|delay_token_id|latent_token_id)"
)
_DEEPEST = 5  # levels of nested configs; an omni model has three


def spans(
    input_ids: Int[Tensor, "batch position"],
    attention_mask: Int[Tensor, "batch position"] | Bool[Tensor, "batch position"] | None = None,
    *,
    config: Any,
) -> dict[str, Bool[Tensor, "batch position"]]:
    """Return the positions of each medium that the model takes, and as `text` those of no medium.

    Padding, where the mask is 0, belongs to none. Where a processor turns a film into pictures, its positions
    are those of `image`.

    >>> found = spans(torch.tensor([[7, 99, 99, 8]]), config={"image_token_id": 99})
    >>> {name: mask.int().tolist() for name, mask in found.items()}
    {'image': [[0, 1, 1, 0]], 'text': [[1, 0, 0, 1]]}
    """
    there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    found = {
        medium: there & torch.isin(input_ids, torch.tensor(sorted(tokens), device=input_ids.device))
        for medium, tokens in _media_tokens(config).items()
    }
    text = there.clone()
    for mask in found.values():
        text &= ~mask
    return {**found, "text": text}


def _media_tokens(config: Any) -> Mapping[str, frozenset[int]]:
    """Return the token ids of each medium's placeholders, from a model's config and the configs in it.

    Media without a placeholder in the config are left out; `None` as config has no media.
    """
    found: dict[str, set[int]] = {}
    for medium, token in _placeholders(config, 0):
        found.setdefault(medium, set()).add(token)
    return {medium: frozenset(found[medium]) for medium in MEDIA if medium in found}


def _placeholders(config: Any, depth: int) -> Iterator[tuple[str, int]]:
    """Yield each medium and the id of a placeholder of it."""
    settings = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in settings.items():
        match = _PLACEHOLDER.fullmatch(name) if isinstance(name, str) else None
        if match and type(value) is int and value >= 0:
            yield match[1], value
        elif name == "vocabulary_map" and isinstance(value, Mapping):  # of Chameleon and Emu3
            yield from (("image", value["<image>"]),) if "<image>" in value else ()
        elif depth < _DEEPEST and hasattr(value, "to_dict"):
            yield from _placeholders(value, depth + 1)
