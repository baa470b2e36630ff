"""Names, cells and columns as text that is safe to print: no control characters, nothing invisible."""

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

NULL = "–"  # an unknown value must look neither like zero nor like an empty cell
_LOST = "\N{REPLACEMENT CHARACTER}"
# Letters, symbols and marks that unicodedata calls visible although they draw nothing.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | frozenset(
    map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])
)
_JOINERS = "\ufe0f\u200d"  # they hold an emoji together
_MARKS = 3  # accents on one letter: no spelling stacks more, and a hundred of them cover the lines around
_LONGEST = 200
_LONGEST_SENTENCE = 2000
_NARROWEST = 24  # characters of a column that is wrapped, however narrow the terminal is


def plain(value: object, most: int = _LONGEST) -> str:
    """Make a name fit to print: one line, nothing invisible, the middle left out if it is long.

    >>> plain("a\\x1b[31mb"), plain("layers.0.mlp.gate_proj", 15)
    ('a�[31mb', 'layers.0…e_proj')
    """
    return seen(_short(str(value), most))


def sentence(words: object, most: int = _LONGEST_SENTENCE) -> str:
    """Make a sentence fit to print: one line, with each word treated as a name.

    >>> sentence("no\\x1b[31m\\n end")
    'no�[31m end'
    """
    return _short(" ".join(map(plain, str(words).split())), most)


def seen(text: str) -> str:
    """Replace invisible characters: control, bidi, zero-width, tag, private use, half surrogate pairs.

    They could make a line look like another one, or two different names look the same.

    >>> seen("gate\\u200b_proj"), seen("❤️ é")
    ('gate�_proj', '❤️ é')
    """
    return text if text.isascii() and text.isprintable() else "".join(_seen(text))


def number(value: object) -> str:
    """Write a table cell: four significant digits, thousands separated, an empty string for null.

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
    """Write a table cell for a reader: like `number`, but with a dash for null.

    >>> cell(None), cell(0.0), cell("")
    ('–', '0', '')
    """
    return NULL if _null(value) else number(value)


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> str:
    """Set rows in columns, numbers to the right; with a width, wrap the words of the last column.

    >>> print(aligned(["role", "rms"], [["gate_proj", "0.1"], ["q", "0.25"]]))
    role        rms
    gate_proj   0.1
    q          0.25
    >>> print(aligned(["sites", "note"], [["28", "compared, and moved to another place"]], width=32))
    sites  note
       28  compared, and moved to
           another place
    """
    whole = plain if width is None else sentence  # what is wrapped may be long
    cells = [list(map(whole, row)) for row in rows]
    grid = [list(map(plain, header)), *cells]
    widths = [max(len(row[at]) for row in grid) for at in range(len(header))]
    right = [bool(cells) and all(_numeric(row[at]) for row in cells) for at in range(len(header))]
    left = sum(widths[:-1]) + 2 * len(widths[:-1])
    room = None if width is None or right[-1:] == [True] else max(_NARROWEST, width - left)

    def lines(row: Sequence[str]) -> Iterator[str]:
        *before, last = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        first, *others = (textwrap.wrap(last, room) or [""]) if room else [last]
        yield "  ".join([*before, first]).rstrip()
        yield from (" " * left + other for other in others)

    return "\n".join(line for row in grid for line in lines(row)) if header else ""


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
    # Both ends of a name identify it: the model and the layer, the matrix and the weight.
    tail = most * 2 // 5
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[len(text) - tail :]}"


def _null(value: object) -> bool:
    return value is None or type(value).__name__ == "NAType" or bool(value != value)  # bool(pd.NA) raises


def _numeric(cell: str) -> bool:
    return not cell or cell[0] in "-+0123456789[" or cell in ("inf", "nan", NULL)
