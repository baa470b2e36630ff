"""HTML fragments for reprs and the report; every name is escaped, since files may come from strangers."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from affectlens.printable import cell, plain, seen

# CSS classes; without them a notebook typesets the text between two $ as a formula.
NO_FORMULAS = "tex2jax_ignore mathjax_ignore"
# A translucent bar, so that the text stays readable in light and dark themes.
_BAR = "text-align:right;min-width:7em;background:linear-gradient(#4a90c47a,#4a90c47a) no-repeat left/{}% 68%"


def escape(name: object) -> str:
    """Escape a name for HTML text and attributes.

    >>> escape("<b>")
    '&lt;b&gt;'
    """
    return html.escape(plain(name), quote=True)


def text(words: object) -> str:
    """Escape running text, at full length.

    >>> text("a < b")
    'a &lt; b'
    """
    return html.escape(seen(str(words)), quote=True)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    most: Mapping[str, float] | None = None,
) -> str:
    """Write a table; every cell is escaped.

    `most` maps columns to their largest value: behind each number of such a column is a bar, whose length
    is the number's share of it. The number stays text.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    scales = [(most or {}).get(name, 0.0) for name in header]
    body = "".join(f"<tr>{''.join(map(_cell, row, scales))}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="{NO_FORMULAS}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: object, most: float) -> str:
    # numpy's integers are no `int`, but have its methods.
    right = ' class="n"' if isinstance(value, (int, float)) or hasattr(value, "bit_length") else ""
    return f"<td{right}{_bar(value, most)}>{escape(cell(value))}</td>"


def _bar(value: object, most: float) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0 or not most > 0:
        return ""
    return f' style="{_BAR.format(f"{100 * min(1.0, value / most):.4g}")}"'
