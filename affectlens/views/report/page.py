"""Write HTML pages: one file each, plotly.js inlined, figures as data, and a policy against any request."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from affectlens.html import text
from affectlens.printable import number, plain

# The only script of ours on the page. It runs after plotly.js and the data.
LOADER = """
const draw = (place) => {
  const spec = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, spec.data, spec.layout, {displayModeBar: false, responsive: true, scrollZoom: false});
};
for (const place of document.querySelectorAll("div.figure")) {
  const fold = place.closest("details:not([open])"); // a closed fold has no width to draw in
  if (fold) fold.addEventListener("toggle", () => draw(place), {once: true});
  else draw(place);
}
"""


def page(title: str, body: str) -> str:
    """Put HTML into a page that needs no network, and whose policy allows none.

    Scripts run only if their hash is in the policy. Inline styles are allowed because plotly writes
    `style` attributes; they can load nothing either, since `data:` is the only source allowed.
    """
    # Without a figure the page stays small: plotly.js alone has five megabytes.
    scripts = (get_plotlyjs(), LOADER) if 'class="figure"' in body else ()
    css = files("affectlens.views").joinpath("report.css").read_text("utf-8")
    tags = "".join(f"<script>{script}</script>" for script in scripts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(scripts)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light"><meta name="referrer" content="no-referrer">'
        '<link rel="icon" href="data:,">'
        f"<title>{text(plain(title))}</title><style>{css}</style></head>"
        f"<body><main>{body}</main>{tags}</body></html>\n"
    )


def policy(scripts: Sequence[str]) -> str:
    """Write the Content-Security-Policy that runs these scripts and loads nothing."""
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def figure(drawn: go.Figure, *, caption: str = "") -> str:
    """Write a figure: an empty element, and its data as JSON that can't end the script tag around it."""
    height = drawn.layout.height or 400
    data = (drawn.to_json() or "{}").replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><div class="scroll"><div class="figure" role="img" aria-label="{text(caption)}" '
        f'style="height:{height:.0f}px"></div><script type="application/json">{data}</script></div>'
        f"{below}</figure>"
    )


def paragraph(words: object, kind: str = "") -> str:
    """Write a paragraph."""
    return f"<p{_class(kind)}>{text(words)}</p>"


def section(title: str, *parts: str) -> str:
    """Write a section, or nothing if it is empty."""
    body = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def items(sentences: Iterable[str], kind: str = "") -> str:
    """Write a list."""
    return f"<ul{_class(kind)}>" + "".join(f"<li>{text(one)}</li>" for one in sentences) + "</ul>"


def grid(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1, caption: str = "") -> str:
    """Write a table that scrolls on a narrow screen; columns after the first `left` hold numbers."""
    head = "".join(
        f"<th{_class('' if at < left else 'n')}>{text(name)}</th>" for at, name in enumerate(header)
    )
    body = "".join(f"<tr>{_row(row, left)}</tr>" for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def folded(title: str, body: str, *, opened: bool = False) -> str:
    """Write a fold that opens on a click."""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{body}</details>"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _row(cells: Sequence[object], left: int) -> str:
    return "".join(
        f"<td{_class('' if at < left else 'n')}>{text(plain(number(cell)))}</td>"
        for at, cell in enumerate(cells)
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
