"""Fragments of the report: headings, paragraphs and tables; every word from outside is escaped here."""

from collections.abc import Iterable, Sequence

from affectlens.html import number, plain, text


def paragraph(words: object, kind: str = "") -> str:
    """Write a paragraph."""
    return f"<p{_class(kind)}>{text(words)}</p>"


def section(title: str, *parts: str) -> str:
    """Write a section, or nothing if it has no content."""
    body = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def items(sentences: Iterable[str], kind: str = "") -> str:
    """Write a list."""
    return f"<ul{_class(kind)}>" + "".join(f"<li>{text(one)}</li>" for one in sentences) + "</ul>"


def grid(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1, caption: str = "") -> str:
    """Write a table that scrolls on a narrow screen; all but the first `left` columns hold figures."""
    head = "".join(
        f"<th{_class('' if at < left else 'n')}>{text(name)}</th>" for at, name in enumerate(header)
    )
    body = "".join(f"<tr>{_row(row, left)}</tr>" for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def folded(title: str, body: str, *, opened: bool = False) -> str:
    """Write a part that opens on a click."""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{body}</details>"


def _row(cells: Sequence[object], left: int) -> str:
    return "".join(
        f"<td{_class('' if at < left else 'n')}>{text(plain(number(cell)))}</td>"
        for at, cell in enumerate(cells)
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
