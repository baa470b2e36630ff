"""Tokenize texts with a model's own tokenizer, and shorten rows of a batch that is padded on the left."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Ids = tuple[int, ...]


def special_tokens(tokenizer: Any) -> tuple[Ids, Ids]:
    """Return the special tokens that a tokenizer adds before and behind a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def encoded(tokenizer: Any, texts: Sequence[tuple[str, int]], *, special: bool) -> list[Ids]:
    """Return the tokens of each text up to the one that holds the character before its `end`.

    With `special`, the tokens that begin a text are added, but none behind it.
    """
    before, after = special_tokens(tokenizer) if special else ((), ())
    if not getattr(tokenizer, "is_fast", False):  # it can't tell where tokens are in the text
        ids = tokenizer([text[:end] for text, end in texts], add_special_tokens=special)["input_ids"]
        return [tuple(row[: len(row) - len(after)]) for row in ids]
    found = tokenizer([text for text, _ in texts], add_special_tokens=special, return_offsets_mapping=True)
    rows = zip(texts, found["input_ids"], found["offset_mapping"], strict=True)
    kept = ((end, ids, offsets[: len(ids) - len(after)]) for (_, end), ids, offsets in rows)
    return [tuple(ids[: max(len(before), _until(offsets, end))]) for end, ids, offsets in kept]


def _until(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """Return how many tokens there are up to the last one that begins before `end`."""
    # Some tokenizers leave spaces out of a token's place: one of spaces alone is at (b, b), its end.
    return max((number for number, (a, b) in enumerate(offsets, 1) if a < end or a == b == end), default=0)


def shortened(batch: Mapping[str, Tensor], cuts: Sequence[int]) -> dict[str, Tensor]:
    """Drop this many tokens at the end of each row of a batch that is padded on the left."""
    if not any(cuts):
        return dict(batch)
    rows, length = batch["input_ids"].shape
    drop, place = torch.tensor(cuts)[:, None], torch.arange(length)
    mask = batch.get("attention_mask", torch.ones(rows, length, dtype=torch.long))
    found = {
        name: tensor.gather(1, ((place - drop) % length).expand(rows, -1))
        for name, tensor in {**batch, "attention_mask": mask}.items()
        if tensor.shape == (rows, length) and not tensor.is_floating_point()
    }
    found["attention_mask"] = found["attention_mask"] * (place >= drop)
    first = int(found["attention_mask"].any(0).int().argmax())
    return {**batch, **{name: tensor[:, first:].contiguous() for name, tensor in found.items()}}
