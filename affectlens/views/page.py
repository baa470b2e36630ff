"""One page, one file: a policy that lets nothing in or out, plotly.js inlined once, figures as data."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from affectlens.html import plain, text

# Runs after the library and the data; the only script that touches the page.
LOADER = """
const draw = (place) => {
  const spec = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, spec.data, spec.layout, {displayModeBar: false, responsive: true, scrollZoom: false});
};
for (const place of document.querySelectorAll("div.figure")) {
  const fold = place.closest("details:not([open])"); // has no width before it is opened
  if (fold) fold.addEventListener("toggle", () => draw(place), {once: true});
  else draw(place);
}
"""


def figure(drawn: go.Figure, *, caption: str = "") -> str:
    """Draw a figure as a place for it and its data, which no browser takes for a script."""
    height = drawn.layout.height or 400
    data = (drawn.to_json() or "{}").replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><div class="scroll"><div class="figure" role="img" aria-label="{text(caption)}" '
        f'style="height:{height:.0f}px"></div><script type="application/json">{data}</script></div>'
        f"{below}</figure>"
    )


def page(title: str, body: str) -> str:
    """Put a body of HTML into a page that needs no network and is allowed none.

    Scripts run only if their hash is in the policy. Styles are inline because plotly writes
    `style` attributes; with no source allowed but `data:`, a style can load nothing either.
    """
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


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
