"""Names and cells as text that is safe to print: one line, no control characters."""

import unicodedata
from collections.abc import Iterator

_LOST = "\N{REPLACEMENT CHARACTER}"
# Letters, symbols and marks that unicodedata takes for visible, and that draw nothing.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | frozenset(
    map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])
)
_JOINERS = "\ufe0f\u200d"  # hold an emoji together
_MARKS = 3  # on one letter; no spelling stacks more, and a hundred of them cover the lines around
_LONGEST = 200
_LONGEST_SENTENCE = 2000
NULL = "–"  # what is not known must not look like a zero, nor like nothing


def plain(value: object, most: int = _LONGEST) -> str:
    """Make a name fit to print: in one line, nothing unseen in it, its middle left out where it is long.

    >>> plain("a\\x1b[31mb"), plain("layers.0.mlp.gate_proj", 15)
    ('a�[31mb', 'layers.0…e_proj')
    """
    return seen(_short(str(value), most))


def sentence(words: object, most: int = _LONGEST_SENTENCE) -> str:
    """Make a sentence fit to print: in one line, each word in it as a name would be.

    >>> sentence("no\\x1b[31m\\n end")
    'no�[31m end'
    """
    return _short(" ".join(map(plain, str(words).split())), most)


def seen(text: str) -> str:
    """Replace what can't be seen: control, bidi, zero-width, tag and private characters, halves of pairs.

    Whoever reads a line could otherwise be shown another one, or two names as if they were the same.

    >>> seen("gate\\u200b_proj"), seen("❤️ é")
    ('gate�_proj', '❤️ é')
    """
    return text if text.isascii() and text.isprintable() else "".join(_seen(text))


def _seen(text: str) -> Iterator[str]:
    letter, marks = "", 0
    for char in text:
        kind = unicodedata.category(char)
        joins = char in _JOINERS and bool(letter) and unicodedata.category(letter) == "So"
        letter, marks = (letter, marks + 1) if joins or kind in ("Mn", "Me") else (char, 0)
        shown = joins or (char.isprintable() and char not in _BLANK) or kind == "Zs"
        if marks <= _MARKS:
            yield char if shown else _LOST


def _short(text: str, most: int) -> str:
    # Both ends of a name say which it is: the model and the layer, the matrix and the weight.
    tail = most * 2 // 5
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[len(text) - tail :]}"


def number(value: object) -> str:
    """Write a cell of a table: four significant digits, thousands separated, nothing for null.

    >>> number(0.123456), number(1234567), number(None), number("x")
    ('0.1235', '1,234,567', '', 'x')
    """
    if _null(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or hasattr(value, "bit_length"):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def cell(value: object) -> str:
    """Write a cell of a table that is looked at: as `number` does, but a dash for null.

    >>> cell(None), cell(0.0), cell("")
    ('–', '0', '')
    """
    return NULL if _null(value) else number(value)


def _null(value: object) -> bool:
    return value is None or type(value).__name__ == "NAType" or bool(value != value)  # NA has no truth
