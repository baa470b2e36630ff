"""Where in a text the media lie: each embedding of a picture, sound or video stands at a token of its own.

    config: the ids of placeholders ──▶ media_tokens ──▶ spans: which positions are image, audio, video, text

A processor writes one placeholder an embedding, and the model puts the embeddings there. What a model gets
elsewhere (by cross-attention, or in front of the text) has no position in it.
"""

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
_DEEPEST = 5  # configs within configs; an omni model has three


def media_tokens(config: Any) -> Mapping[str, frozenset[int]]:
    """The ids of the placeholders of each medium, as a model's config and those within it name them.

    Media that the config names no token of are left out; `None` has no media.
    """
    found: dict[str, set[int]] = {}
    for medium, token in _placeholders(config, 0):
        found.setdefault(medium, set()).add(token)
    return {medium: frozenset(found[medium]) for medium in MEDIA if medium in found}


def _placeholders(config: Any, depth: int) -> Iterator[tuple[str, int]]:
    settings = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in settings.items():
        match = _PLACEHOLDER.fullmatch(name) if isinstance(name, str) else None
        if match and type(value) is int and value >= 0:
            yield match[1], value
        elif name == "vocabulary_map" and isinstance(value, Mapping):  # of Chameleon and Emu3
            yield from (("image", value["<image>"]),) if "<image>" in value else ()
        elif depth < _DEEPEST and hasattr(value, "to_dict"):
            yield from _placeholders(value, depth + 1)


def spans(
    input_ids: Int[Tensor, "batch position"],
    attention_mask: Int[Tensor, "batch position"] | Bool[Tensor, "batch position"] | None = None,
    *,
    config: Any,
) -> dict[str, Bool[Tensor, "batch position"]]:
    """The positions of each medium that the model knows, and under `text` those of no medium.

    Padding, where the mask is 0, is in none. Media that a processor turns into another, as some do with the
    frames of a video, are where it put them.
    """
    there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    found = {
        medium: there & torch.isin(input_ids, torch.tensor(sorted(tokens), device=input_ids.device))
        for medium, tokens in media_tokens(config).items()
    }
    text = there.clone()
    for mask in found.values():
        text &= ~mask
    return {**found, "text": text}
