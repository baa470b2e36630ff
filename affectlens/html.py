"""Escape-safe fragments for reprs and the report: names come from files, and files from strangers."""

import html
import re
from collections.abc import Iterable, Sequence

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_LONGEST = 200


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
    if value is None or type(value).__name__ == "NAType" or value != value:  # pandas.NA has no truth
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or hasattr(value, "bit_length"):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def table(header: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """Draw a table; every cell is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="al">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: object) -> str:
    right = ' class="n"' if isinstance(value, (int, float)) or hasattr(value, "bit_length") else ""
    return f"<td{right}>{escape(number(value))}</td>"
