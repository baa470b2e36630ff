"""Find one item of a medium, a tile or frame of it, or a word of the text, in the tokens of a batch."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from affectlens.errors import LensError, quoted
from affectlens.lens.inputs.media_items import MARK, Item, Sizes, items
from affectlens.lens.inputs.placeholders import spans
from affectlens.sites.span_names import SpanName
from affectlens.tasks.written_answers import UNSPACED

_SHOWN = 20  # words that an error lists


@dataclass(frozen=True, eq=False)
class TokenReader:
    """Who reads the tokens of a model: its config names placeholders, its tokenizer knows words."""

    config: Any = None
    tokenizer: Any = None

    def chosen(
        self,
        name: SpanName,
        ids: Int[Tensor, "batch position"],
        *,
        own: Bool[Tensor, "batch position"],
        sizes: Sizes,
    ) -> Bool[Tensor, "batch position"]:
        """Return the positions of a span in the tokens of a prompt.

        Raises `LensError` where a row has no such item, part or word, listing what it has.
        """
        found = spans(ids, own.long(), config=self.config)
        if name.kind not in found:
            raise LensError(
                f"the input of this model has no {name.kind}. Spans that its config names: {', '.join(found)}"
            )
        if name.word:
            return self._word(name.word, ids, found["text"])
        if not name.number:
            return found[name.kind]
        every = items(name.kind, found[name.kind], sizes=sizes, config=self.config, marks=self._marks(ids))
        chosen = torch.zeros_like(own)
        for row in range(len(own)):
            for place in _places(name, [one for one in every if one.row == row], row=row):
                chosen[place] = True
        return chosen

    def _marks(self, ids: Tensor) -> Tensor | None:
        convert = getattr(self.tokenizer, "convert_tokens_to_ids", None)
        mark = convert(MARK) if convert is not None else None
        if type(mark) is not int or mark == getattr(self.tokenizer, "unk_token_id", None):
            return None
        return torch.eq(ids, mark)

    def _word(self, word: str, ids: Tensor, text: Tensor) -> Tensor:
        if self.tokenizer is None:
            raise LensError(f"words need a tokenizer, and this lens has none: can't find {quoted(word)}")
        chosen = torch.zeros_like(text)
        for row in range(len(ids)):
            heard: list[str] = []
            for start, stop in _stretches(text[row].tolist()):
                tokens = ids[row, start:stop].tolist()
                for first, last in self._matches(word, tokens, heard):
                    chosen[row, start + first : start + last] = True
            if not chosen[row].any():
                words = list(dict.fromkeys(re.findall(r"\w+", " ".join(heard))))
                more = ", …" if words[_SHOWN:] else ""
                raise LensError(
                    f"the word {quoted(word)} is not in the text of example {row + 1}. Words there: "
                    f"{', '.join(map(quoted, words[:_SHOWN])) or 'none'}{more}"
                )
        return chosen

    def _matches(self, word: str, tokens: Sequence[int], heard: list[str]) -> Iterator[tuple[int, int]]:
        """Yield the first token of each occurrence of a word, and the one behind its last."""
        written = self._decoded(tokens)
        heard.append(written)
        matches = list(re.finditer(_whole(word), written))
        if not matches:
            return
        # The text up to each token, since a token alone may be a part of a character: then the text ends in
        # replacement characters, and the next token begins before them.
        so_far = [self._decoded(tokens[:number]) for number in range(len(tokens) + 1)]
        for match in matches:
            inside = [
                number
                for number in range(len(tokens))
                if len(so_far[number + 1]) > match.start()
                and len(so_far[number].rstrip("\ufffd")) < match.end()
            ]
            yield inside[0], inside[-1] + 1

    def _decoded(self, tokens: Sequence[int]) -> str:
        found: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return found


def _whole(word: str) -> str:
    """Return a pattern for a whole word; in scripts without spaces it may stand inside a run of letters."""
    inside = re.search(f"[{UNSPACED}]", word)
    return re.escape(word) if inside else rf"(?<!\w){re.escape(word)}(?!\w)"


def _stretches(there: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield where runs of true begin and end."""
    start = None
    for number, one in enumerate([*there, False]):
        if one and start is None:
            start = number
        elif not one and start is not None:
            yield start, number
            start = None


def _places(name: SpanName, there: Sequence[Item], *, row: int) -> Sequence[tuple[int, int]]:
    """Return the positions of an item or part among those of one row."""
    if name.number > len(there):
        has = ", ".join(f"{name.kind}:{number + 1}" for number in range(len(there))) or f"no {name.kind}"
        raise LensError(f"example {row + 1} has no {name.kind}:{name.number}. It has {has}")
    item = there[name.number - 1]
    if not name.part:
        return item.places
    if name.part > len(item.parts):
        part = "tile" if name.kind == "image" else "frame"
        has = f"{part}s 1 to {len(item.parts)}" if item.parts else f"no {part}s that can be told apart"
        raise LensError(
            f"{name.kind}:{name.number} of example {row + 1} has no {part}:{name.part}. It has {has}"
        )
    return item.parts[name.part - 1]
