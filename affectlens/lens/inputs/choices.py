"""Tokenize prompts together with the labels that may answer them, as the model's own template writes both.

    example ── prompt ───────────────▶ tokens of the prompt ┐
            ── prompt + label, each ──▶ tokens of the whole ─┴─ longest common prefix ──▶ prompt | label

Where the end of the prompt merges with the label into one token, both are cut before that token, so that
prompt + label is the whole that the model was trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from affectlens.errors import LensError, quoted
from affectlens.lens.failures import told
from affectlens.lens.inputs.preparing import prepare
from affectlens.lens.inputs.prompt_format import PromptFormat
from affectlens.lens.inputs.tokens import Ids, encoded, shortened
from affectlens.tasks import Example


@dataclass(frozen=True)
class Choices:
    """A batch of prompts, and the token ids of each label behind each of them."""

    batch: dict[str, Tensor]
    labels: tuple[tuple[Ids, ...], ...]  # by row, by label


def choices(
    form: PromptFormat, examples: Sequence[Example], *, labels: Sequence[str], prompt: str, config: Any
) -> Choices:
    """Prepare examples for a decoder that scores labels behind their prompts. Raises `LensError`."""
    answers = [form.answered(example, prompt) for example in examples]
    texts = [answer.prompt for answer in answers]
    batch = prepare(form, examples, texts=texts, config=config)
    special = form.adds_special_tokens(texts)
    found, cuts = list[tuple[Ids, ...]](), list[int]()
    with told("the labels can't be tokenized"):
        asked = encoded(form.tokenizer, [(text, len(text)) for text in texts], special=special)
        for answer, ids in zip(answers, asked, strict=True):
            wholes = encoded(form.tokenizer, [answer.saying(label) for label in labels], special=special)
            start = min(_shared(ids, whole) for whole in wholes)
            found.append(tuple(whole[start:] for whole in wholes))
            cuts.append(len(ids) - start)
    if any(cuts):
        form.say(
            "the end of the prompt and the beginning of a label are one token for this tokenizer; it "
            "is scored as part of the label"
        )
        _check_ends(batch, asked, examples)
    return Choices(shortened(batch, cuts), tuple(found))


def _shared(one: Ids, other: Ids) -> int:
    """Return the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _check_ends(batch: Mapping[str, Tensor], asked: Sequence[Ids], examples: Sequence[Example]) -> None:
    """Raise `LensError` where the processor ends a prompt with another token than its tokenizer."""
    for row, ids, example in zip(batch["input_ids"].tolist(), asked, examples, strict=True):
        if row[-1:] != list(ids[-1:]):
            raise LensError(
                f"example {quoted(example.id)}: the processor ends the prompt with another token than its "
                "tokenizer, so the boundary between prompt and label is unknown"
            )
