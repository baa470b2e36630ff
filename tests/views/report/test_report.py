"""The report is one file that shows every table, loads nothing and runs only its own scripts."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.table import Table
from affectlens.views import Report

Drifts = Callable[..., Drift]
Sweeps = Callable[..., Effects]
MOVED = {"o_proj": 0.4, "gate_proj": 0.2, "up_proj": 0.1}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ORDER = [
    "What was compared", "Findings", "Every parameter, accounted for", "Where it moved", "Role by role",
    "Gate against up", "Effects by group of sites", "Scores of the whole models", "Methods and limits",
]  # fmt: skip


def test_sections_are_in_order(make_drift: Drifts, make_effects: Sweeps) -> None:
    """Sections run from what was compared to the methods, in the order of the argument."""
    html = Report(make_drift(), make_effects(MOVED)).html

    assert ORDER == re.findall(r"<h2>(.*?)</h2>", html)


@pytest.mark.parametrize("names", [("drift",), ("effects",), ("drift", "effects", "other"), ("other",)])
def test_any_tables_make_a_report(make_drift: Drifts, make_effects: Sweeps, names: tuple[str, ...]) -> None:
    """A drift alone, effects alone and other tables each make a page."""
    tables = {"drift": make_drift(), "effects": make_effects(MOVED), "other": Table(make_drift().frame)}
    report = Report(*(tables[name] for name in names), notes="a note")

    assert "<li>a note</li>" in report.html
    assert repr(report).startswith("Report('Where the change is': ")


def test_ledger_accounts_for_both_sides(make_drift: Drifts) -> None:
    """The ledger's totals are compared with the parameters of the sources."""
    whole, part = make_drift(layers=2), make_drift(layers=2)
    part.origin["sources"]["tuned"]["parameters"] *= 2

    assert (
        "100 % of base: 1,536 parameters. The ledger accounts for 100 % of tuned: 1,536" in Report(whole).html
    )
    assert "does not account for all of tuned: 1,536 of 3,072 (50\xa0%)" in Report(part).html


def test_settings_appear_once_if_the_tables_agree(make_drift: Drifts, make_effects: Sweeps) -> None:
    """A seed that both tables share appears once; commands that differ carry the table's name."""
    effects = make_effects(MOVED)
    effects.origin.update(dtype="float32", device="cpu")
    html = Report(make_drift(), effects).html

    assert 1 == html.count("<td>seed</td>")
    assert "<td>dtype of the live model (Effects)</td><td>float32</td>" in html
    assert "<td>device (Effects)</td><td>cpu</td>" in html
    assert "<td>command (Drift)</td>" in html
    assert "<td>command (Effects)</td>" in html
    assert "<td>device</td><td>cpu</td>" in Report(effects).html


def test_findings_appear_once_and_in_full(make_drift: Drifts, make_effects: Sweeps) -> None:
    """A finding of both tables appears once, one of the effects at the top, and none is cut."""
    long = "the reference is not the tuned model itself: " + "why " * 100
    drift, effects = make_drift(findings=["amiss in both"]), make_effects(MOVED)
    effects.origin["findings"] = ["amiss in both", long]
    html = Report(drift, effects).html
    page, said = html.replace(cards(html), ""), Report(drift, effects).conclusions

    assert 1 == page.count("<li>amiss in both</li>")
    assert f'<ul class="findings"><li>{long.strip()}</li></ul>' in page
    assert said is not None
    assert ["amiss in both", long.strip()] == list(said.may_not[:2])
    assert 1 == said.may_not.count("amiss in both")


def test_small_print_counts_the_clusters(make_effects: Sweeps) -> None:
    """The small print says how reliable the intervals are, with the clusters of each task if known."""
    effects = make_effects(MOVED)
    plain = Report(effects).html
    effects.origin["tasks"]["emotion"]["clusters"] = 12
    counted = Report(effects).html

    assert "the BCa bootstrap over clusters of examples, widened for small samples" in plain
    assert "With few clusters (below about 50) they cover less than 95\xa0%." in plain
    assert "Independent clusters of examples" not in plain
    assert "Independent clusters of examples: emotion 12 (few)." in counted


def test_a_bar_at_the_line_is_no_verdict_on_the_role(make_drift: Drifts) -> None:
    """The caption says that a norm equal to noise says nothing about what the role does."""
    html = Report(make_drift()).html

    assert (
        "the norm doesn&#x27;t distinguish the role&#x27;s drift from noise, whatever the role does" in html
    )
    assert "did nothing that noise" not in html


def test_no_name_escapes(make_drift: Drifts, make_effects: Sweeps, hostile: str) -> None:
    """A name that would run as a script is text everywhere on the page."""
    html = (
        hostile_report(make_drift, make_effects, hostile).html
        + hostile_report(make_drift, make_effects, hostile)._repr_html_()
    )

    assert 0 == html.count("<img") - plotly_itself(html, "<img")
    assert hostile not in html


def test_nothing_is_loaded(make_drift: Drifts, make_effects: Sweeps) -> None:
    """Outside plotly's own code the page contains no address and no tag that loads anything."""
    html = Report(make_drift(), make_effects(MOVED)).html
    ours = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)

    assert [] == re.findall(r"https?:|//\w|<iframe|<img|@import|url\(|src=", ours)
    assert "default-src 'none'" in ours
    assert 1 == html.count("plotly.js v")


def test_summary_for_a_notebook_is_short(make_drift: Drifts, make_effects: Sweeps) -> None:
    """In Jupyter the report shows its sentences, not five megabytes."""
    assert 20_000 > len(Report(make_drift(), make_effects(MOVED))._repr_html_())


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser_reports_no_error_and_asks_for_nothing(
    make_drift: Drifts, make_effects: Sweeps, hostile: str, tmp_path: Path
) -> None:
    """A browser draws every figure with an empty console, where the policy would report any request."""
    page = hostile_report(make_drift, make_effects, hostile).save(tmp_path / "report.html")
    dom, console = browse(page)

    assert [] == console
    assert 4 == dom.count('class="plot-container')
    assert 4 * 3 == dom.count('class="main-svg"')


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser_test_would_notice(make_drift: Drifts, tmp_path: Path) -> None:
    """The same browser reports a page that loads something or runs a foreign script."""
    html = Report(make_drift()).html.replace(
        "</main>", "<img src='https://localhost/x'><script>1</script></main>"
    )
    (tmp_path / "report.html").write_text(html, "utf-8")

    assert 2 == len(browse(tmp_path / "report.html")[1])


def hostile_report(make_drift: Drifts, make_effects: Sweeps, hostile: str) -> Report:
    """Build a report in which every name is hostile."""
    drift = make_drift(findings=[hostile], command=hostile, versions={hostile: hostile})
    drift.frame["parameter"] = hostile
    drift.origin["ledger"][0] |= {"state": hostile, "note": hostile}
    for facts in drift.origin["sources"].values():
        facts |= {"name": hostile, "format": hostile, "model_type": hostile, "dtype": hostile}
    effects = make_effects({**MOVED, hostile: 0.3}, task=hostile, metric=hostile)
    effects.origin["findings"] = [f"more {hostile}"]
    effects.origin["sources"] = {
        side: {"name": hostile, "content_sha256": hostile + side} for side in ("base", "tuned", hostile)
    }
    return Report(drift, effects, Table(drift.frame), title=hostile, notes=[hostile])


def cards(html: str) -> str:
    """Return the section with the sentences."""
    return re.findall(r"<section><h2>Findings</h2>.*?</section>", html, flags=re.DOTALL)[0]


def plotly_itself(html: str, tag: str) -> int:
    """Count a tag in the page's scripts, which hold plotly's own templates."""
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    return sum(script.count(tag) for script in scripts)


def browse(page: Path) -> tuple[str, list[str]]:
    """Open a page; return the DOM after its scripts ran and the lines on its console."""
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--virtual-time-budget=8000", "--enable-logging=stderr", "--v=0",
            f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
