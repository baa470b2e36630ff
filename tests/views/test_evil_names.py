"""Names that look like markup, templates or terminal commands are shown as text everywhere."""

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from affectlens import html, printable
from affectlens.cli.text import rows, tell_conclusions, tell_drift, tell_effects
from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.printable import plain
from affectlens.sites import Site, Sites
from affectlens.table import Table
from affectlens.views import Plot, Report, plot
from affectlens.views.figures.style import fitted
from tests.evil_names import EVIL
from tests.views.report.test_report import BROWSER, browse

Drifts = Callable[..., Drift]
Sweeps = Callable[..., Effects]
MOVED = {"o_proj": 0.4, "gate_proj": 0.2, "up_proj": 0.1}
TAGS = (
    "html head meta link title style body main header section h1 h2 h3 h4 p ul li div table caption thead "
    "tbody tr th td figure figcaption details summary small b script"
)
ATTRIBUTES = "lang charset http-equiv content name rel href class style role aria-label type open"
OURS = re.compile(
    r"</?b>|<br>|<extra></extra>|%\{(customdata|x|y|z)(:[^}]*)?\}"
)  # markup that our own figures use
NAMES = [name for name in EVIL if name]


@pytest.fixture
def drift(make_drift: Drifts) -> Drift:
    """Return a drift in which every string from a file is an evil name."""
    made = make_drift(
        layers=6, findings=list(EVIL), command=" ".join(EVIL[:9]), versions=dict.fromkeys(NAMES, "1")
    )
    made.frame["parameter"] = [NAMES[row % len(NAMES)] for row in range(len(made.frame))]
    made.origin["ledger"] += [{"state": name, "note": name, "sites": 0} for name in NAMES]
    for side, name in zip(made.origin["sources"].values(), NAMES, strict=False):
        side |= dict.fromkeys(("name", "format", "model_type", "dtype", "revision"), name)
    return made


@pytest.fixture
def effects(make_effects: Sweeps) -> Effects:
    """Return effects whose groups, task and metric have evil names."""
    made = make_effects({**MOVED, **dict.fromkeys(NAMES, 0.3)}, task=NAMES[0], metric=NAMES[1])
    made.origin["findings"] = list(EVIL)
    made.origin["tasks"][NAMES[0]] |= {"about": NAMES[2], "kind": NAMES[3], "clusters": 3}
    return made


@pytest.fixture
def report(drift: Drift, effects: Effects) -> Report:
    """Return the report on both and a further table."""
    return Report(drift, effects, Table(drift.frame), title=NAMES[0], notes=list(EVIL))


class Page(HTMLParser):
    """Parse a page into the tags, attributes, texts and scripts that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: dict[str, list[str]] = {}
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.add(tag)
        self.texts.append("\n")
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        """Separate the texts of two tags."""
        self.texts.append("\n")

    def handle_data(self, data: str) -> None:
        """Note text, apart from scripts and styles."""
        (self.scripts if self.lasttag in ("script", "style") and data.strip() else self.texts).append(data)


def test_html_is_what_we_wrote(drift: Drift, effects: Effects, report: Report) -> None:
    """Pages contain only our tags and attributes; names appear only as text, escaped once."""
    sites = Sites([Site("language", "gate_proj", layer=0, label=name) for name in NAMES])
    table = html.table(NAMES, [NAMES], caption=NAMES[0], most=dict.fromkeys(NAMES, 1.0))
    pages = {
        "report": report.html, "summary": report._repr_html_(), "drift": drift._repr_html_(), "table": table,
        "effects": effects._repr_html_(), "sites": sites._repr_html_(),
    }  # fmt: skip

    for where, page in pages.items():
        found = Page(page)
        assert set() == found.tags - set(TAGS.split()), where
        assert set() == set(found.attributes) - set(ATTRIBUTES.split()), where
        values = " ".join(
            value for name, each in found.attributes.items() if name != "aria-label" for value in each
        )
        assert [] == [name for name in NAMES if name[:20] in values and len(name) > 6], where
    for where in ("report", "table"):
        lines = {line.strip() for line in Page(pages[where]).texts}
        assert [] == [name for name in NAMES if plain(name).strip() not in lines], where


def test_a_notebook_typesets_no_name(drift: Drift) -> None:
    """A table's HTML tells MathJax 2 and 3 to typeset nothing in it."""
    drawn = drift._repr_html_()

    assert drawn.startswith('<div class="tex2jax_ignore mathjax_ignore">')
    assert drawn.endswith("</div>")


def test_figures_hold_text(drift: Drift, effects: Effects) -> None:
    """Titles, labels, legends, hovers and annotations contain no tag, template or TeX but our own."""
    plots = [plot(drift, kind, title=NAMES[0]) for kind in ("map", "roles", "contrast")]
    plots += [plot(effects, title=NAMES[1]), plot(effects, actions=["revert"], title=NAMES[8])]

    for spec in plots:
        for figure in (spec.figure, fitted(spec.figure, "acl")):
            for text in texts(json.loads(figure.to_json())):
                assert not re.search(r"[<>$]", OURS.sub("", text)), text
                assert text.isprintable()
                assert 1000 > len(text)


def test_labels_leave_room_for_the_figure(effects: Effects) -> None:
    """Labels beside an axis are cut shorter than those in a hover."""
    figure = plot(effects).figure

    labels = [label for label in figure.layout.yaxis.ticktext if "xxx" in label]
    hovers = [hover for trace in figure.data for hover in trace.customdata or () if "xxx" in hover]
    assert 36 == len(labels[0])
    assert 200 < len(hovers[0])


def test_saved_pages_and_figures_hold_text(drift: Drift, effects: Effects, tmp_path: Path) -> None:
    """A saved plot is our page around the figure's data, out of which no name can break."""
    for number, spec in enumerate([plot(drift, title=NAMES[0]), plot(effects, title=NAMES[6])]):
        page = Page(spec.save(tmp_path / f"{number}.html").read_text("utf-8"))
        data = next(script for script in page.scripts if script.startswith("{"))
        saved = json.loads(spec.save(tmp_path / f"{number}.json").read_text("utf-8"))

        assert set() == page.tags - set(TAGS.split())
        assert saved == json.loads(data)
        assert not re.search(r"[<>&]", data)


def test_a_terminal_shows_text(drift: Drift, effects: Effects, report: Report) -> None:
    """No line contains invisible characters, and a line break in a name makes no new line."""
    drift.frame["tower"] = "language"
    told = {
        "drift": tell_drift(drift),
        "effects": tell_effects(effects, NAMES[1]),
        "conclusions": tell_conclusions(drift, effects),
        "rows": rows(drift.frame),
        "ledger": rows(drift.ledger),
        "plot": [repr(plot(drift, title=NAMES[11])), repr(report)],
        "reprs": [line for table in (drift, effects, Table(drift.frame)) for line in repr(table).split("\n")],
    }

    for where, said in told.items():
        for line in (line for text in said for line in text.split("\n")):
            assert line == printable.seen(line), where
            assert not line.startswith("forged"), where
    assert 1 + len(drift.frame) == len(told["rows"])


def texts(value: Any) -> Iterator[str]:
    """Yield every string in a figure's JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for one in value.values():
            yield from texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_text(drift: Drift, report: Report, tmp_path: Path) -> None:
    """After all scripts ran, no name has made an element, and the policy has reported nothing."""
    saved = (
        report.save(tmp_path / "report.html"),
        plot(drift, title=NAMES[0]).save(tmp_path / "plot.html"),
    )
    for dom, console in map(browse, saved):
        page = Page(re.sub(r"<(script|style)\b.*?</\1>", "", dom, flags=re.DOTALL))
        sources = [value for name in ("href", "src", "xlink:href") for value in page.attributes.get(name, [])]

        assert [] == console
        assert 'class="main-svg"' in dom
        assert set() == page.tags & {"a", "img", "script", "iframe", "object", "embed", "form", "input"}
        assert [] == [name for name in page.attributes if name.startswith("on")]
        assert [] == [value for value in sources if not value.startswith("data:")]


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_hovers_show_text(drift: Drift, effects: Effects, tmp_path: Path) -> None:
    """A hover shows each name as it is: no tag, no filled template, nothing typeset by MathJax."""
    shown = hovered(plot(drift), 0, tmp_path / "map.html") + hovered(
        plot(effects), 2, tmp_path / "groups.html"
    )

    assert [] == [name for name in NAMES if plain(name).strip() not in shown and len(name) < 60]


def hovered(spec: Plot, trace: int, path: Path) -> list[str]:
    """Return the lines of all labels that appear when the points of one trace are hovered in turn."""
    path.write_text(HOVERING % (get_plotlyjs(), page_safe(spec.figure.to_json()), trace), "utf-8")
    dom, console = browse(path)
    assert [] == console
    found: list[str] = json.loads("".join(Page(dom[dom.index("<pre>") :]).texts))
    return found


def page_safe(data: str) -> str:
    """Escape JSON for use in a script tag."""
    return data.replace("<", "\\u003c")


# MathJax is a stub with a version only: if plotly called it, the call would fail and be reported.
HOVERING = """<!DOCTYPE html><meta charset="utf-8"><div id="place"></div><script>%s</script><script>
const spec = %s, told = [], pause = (time) => new Promise((done) => setTimeout(done, time));
window.MathJax = {version: "3.2.2"};
Plotly.newPlot("place", spec.data, spec.layout).then(async () => {
  const trace = document.getElementById("place").data[%d], map = trace.type == "heatmap";
  const of = (y, at) => map ? trace.x.map((x) => [x, y]) : [[trace.x[at], y]];
  for (const [xval, yval] of trace.y.flatMap(of)) {
    Plotly.Fx.hover("place", {xval, yval}, "xy");
    await pause(100);
    for (const line of document.querySelectorAll(".hovertext tspan.line")) told.push(line.textContent.trim());
  }
  document.body.innerHTML = "<pre></pre>";
  document.body.firstChild.textContent = JSON.stringify(told);
});
</script>"""
