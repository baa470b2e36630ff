"""Escape-safe fragments for reprs and the report: names come from files, and files from strangers."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_LONGEST = 200
NULL = "–"  # what is not known must not look like a zero, nor like nothing
# A tint that lets both light and dark themes, and their text, show through.
_BAR = "text-align:right;min-width:7em;background:linear-gradient(#4a90c47a,#4a90c47a) no-repeat left/{}% 68%"


def plain(value: object) -> str:
    """Make a name fit to print: no control, bidi or zero-width character, at most 200 characters.

    >>> plain("a\\x1b[31mb")
    'a�[31mb'
    """
    text = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def escape(value: object) -> str:
    """Escape a value for HTML text and attributes.

    >>> escape("<b>")
    '&lt;b&gt;'
    """
    return html.escape(plain(value), quote=True)


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


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    most: Mapping[str, float] | None = None,
) -> str:
    """Draw a table; every cell is escaped.

    Behind the numbers of a column in `most` stands a bar, as long as the number's share of the value there;
    the number itself stays text.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    scales = [(most or {}).get(name, 0.0) for name in header]
    body = "".join(f"<tr>{''.join(map(_cell, row, scales))}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="al">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: object, most: float) -> str:
    right = ' class="n"' if isinstance(value, (int, float)) or hasattr(value, "bit_length") else ""
    return f"<td{right}{_bar(value, most)}>{escape(cell(value))}</td>"


def _bar(value: object, most: float) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0 or not most > 0:
        return ""
    return f' style="{_BAR.format(f"{100 * min(1.0, value / most):.4g}")}"'
