"""Compare the tokenizers of two checkpoints: rows of embeddings are the same words only in one order."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from affectlens.checkpoints.store import Store
from affectlens.checkpoints.tokenizer_files import TokenizerFiles, open_tokenizer
from affectlens.errors import CheckpointError, quoted
from affectlens.printable import plain

Rows = NDArray[np.int64]


class Words(NamedTuple):
    """How the tokenizers of two checkpoints differ, and if their order does, the rows of the same words."""

    findings: tuple[str, ...] = ()
    rows: tuple[Rows, Rows] | None = None  # of base and of tuned, one pair for each common token


def compare_words(base: Store, tuned: Store) -> Words:
    """Compare the tokenizers beside two checkpoints; nothing is known if one of them has no files here."""
    try:
        one, two = open_tokenizer(base), open_tokenizer(tuned)
        if one is None or two is None or one.paths == two.paths:
            return Words()
        found, rows = list(_templates(one, two)), None
        if one.content != two.content:
            found += _parts(one, two)
            rows = None if one.tokens is None or two.tokens is None else _rows(one.tokens, two.tokens)
            found += _vocabularies(one.tokens, two.tokens)
        return Words(tuple(found), rows)
    except CheckpointError as error:
        where = plain(Path(error.path).name)  # the folder is no business of a result
        return Words((f"The tokenizers were not compared: {where} {error.reason}.",))


def _templates(one: TokenizerFiles, two: TokenizerFiles) -> Iterator[str]:
    names = sorted(one.templates.keys() & two.templates.keys())
    if bool(one.templates) != bool(two.templates):
        has, lacks = ("base", "tuned") if one.templates else ("tuned", "base")
        yield f"The chat templates differ: {has} has one, {lacks} has none, so each is asked in its own form."
    elif any(one.templates[name].strip() != two.templates[name].strip() for name in names):
        yield "The chat templates of base and tuned differ: each is asked in its own form."


def _parts(one: TokenizerFiles, two: TokenizerFiles) -> Iterator[str]:
    if not one.parts or not two.parts:
        if one.tokens is None or two.tokens is None:
            yield "The tokenizers differ, in files that can't be compared token by token."
        return
    apart = [name for name in one.parts if one.parts[name] != two.parts[name]]
    if apart:
        yield f"The tokenizers differ in {', '.join(apart)}: the same text may become other tokens."


def _vocabularies(one: Mapping[str, int] | None, two: Mapping[str, int] | None) -> Iterator[str]:
    if one is None or two is None:
        return
    lone = len(one.keys() - two.keys()), len(two.keys() - one.keys())
    if any(lone):
        first = quoted(min(one.keys() ^ two.keys()))
        yield (
            f"The vocabularies differ: {lone[0]:,} tokens are in base alone, {lone[1]:,} in tuned alone "
            f"(first: {first})."
        )
    moved = sorted(token for token in one.keys() & two.keys() if one[token] != two[token])
    if moved:
        first = f"{quoted(moved[0])}, {one[moved[0]]} → {two[moved[0]]}"
        yield f"In the vocabularies {len(moved):,} common tokens have another number (first: {first})."


def _rows(one: Mapping[str, int], two: Mapping[str, int]) -> tuple[Rows, Rows] | None:
    """Return the numbers of the common tokens on both sides; None if they are the same."""
    pairs = {one[token]: two[token] for token in one.keys() & two.keys()}
    if all(number == other for number, other in pairs.items()):
        return None
    # Rows of no token, which pad the matrix, are matched by number.
    most = max(*one.values(), *two.values())
    spare = set(range(most)) - set(one.values()) - set(two.values())
    pairs |= {number: number for number in spare}
    order = sorted(pairs)
    return np.array(order, np.int64), np.array([pairs[number] for number in order], np.int64)


def within(rows: tuple[Rows, Rows], lengths: tuple[int, int]) -> tuple[Rows, Rows]:
    """Keep the pairs of rows that two matrices of these lengths have, and pair the rows beyond all tokens."""
    base, tuned = lengths
    last = max(int(rows[0].max(initial=-1)), int(rows[1].max(initial=-1))) + 1
    more = np.arange(last, min(base, tuned), dtype=np.int64)
    one, two = (np.concatenate([side, more]) for side in rows)
    there = (one < base) & (two < tuned)
    return one[there], two[there]
