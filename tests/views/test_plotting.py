"""Plots are specs: cheap to make, drawn on request, saved by suffix."""

import builtins
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.errors import MissingExtra, TableError
from affectlens.table import Table
from affectlens.views import Plot, plot
from affectlens.views.plotting import FIGURES

Drifts = Callable[..., Drift]
Sweeps = Callable[..., Effects]
MOVED = {"o_proj": 0.4, "gate_proj": 0.2}


def test_kind_follows_table(make_drift: Drifts, make_effects: Sweeps) -> None:
    """Without a kind, a drift is drawn as a map and effects as effects."""
    kinds = [plot(make_drift()).kind, plot(make_effects(MOVED)).kind]

    assert ["map", "effects"] == kinds


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mpa", {}, "no plot 'mpa' of a Drift. Kinds: map, roles, contrast, neurons. Did you mean 'map'?"),
        ("map", {"measur": 1}, ("plot 'map' has no option 'measur'. Options: measure, tower, title. "
                               "Did you mean 'measure'?")),
    ],
)  # fmt: skip
def test_unknown_kind_or_option_names_the_near_one(
    make_drift: Drifts, kind: str, options: dict[str, int], message: str
) -> None:
    """A wrong kind or option is an error at once, which lists those that exist."""
    with pytest.raises(TableError) as caught:
        plot(make_drift(), kind, **options)

    assert message == str(caught.value)


def test_other_table_is_refused(make_drift: Drifts) -> None:
    """A table without figures is an error that lists the tables with figures."""
    with pytest.raises(TableError, match=r"no plot of a Table. Tables with plots: Drift, Effects"):
        plot(Table(make_drift().frame))


def test_every_figure_is_one_row_and_in_the_docstring() -> None:
    """A kind is listed once for its table, its function takes the table first, and `plot` documents it."""
    rows = [(table, kind) for table, kind, _ in FIGURES]

    assert len(rows) == len(set(rows))
    for _, kind, draw in FIGURES:
        first, *options = inspect.signature(draw).parameters.values()
        assert first.kind is first.POSITIONAL_OR_KEYWORD
        assert all(option.kind is option.KEYWORD_ONLY for option in options)
        assert f'`"{kind}"`' in str(plot.__doc__)


def test_plot_is_frozen_and_its_repr_draws_nothing(make_drift: Drifts) -> None:
    """A plot can't be changed, and a plot that can't be drawn can be printed."""
    spec = plot(make_drift(), measure="no such measure")

    assert "Plot('map' of Drift, base → tuned (control: control), measure='no such measure')" == repr(spec)
    with pytest.raises(FrozenInstanceError):
        spec.kind = "roles"  # type: ignore[misc]


def test_unknown_measure_is_an_error_when_drawn(make_drift: Drifts) -> None:
    """An unknown measure is an error, which suggests the nearest one."""
    with pytest.raises(TableError, match=r"no measure 'rsm'.*Did you mean 'rms'"):
        _ = plot(make_drift(), measure="rsm").figure


def test_json_holds_the_figure(make_drift: Drifts, tmp_path: Path) -> None:
    """A saved JSON file holds the figure's data and layout."""
    saved = json.loads(plot(make_drift(), "contrast").save(tmp_path / "c.json").read_text("utf-8"))

    assert {"data", "layout"} == set(saved)


def test_html_is_one_file_with_a_policy(make_drift: Drifts, hostile: str, tmp_path: Path) -> None:
    """The policy of a saved page allows no source but the page itself."""
    text = plot(make_drift(), title=hostile).save(tmp_path / "c.html").read_text("utf-8")

    assert "default-src 'none'; script-src 'sha256-" in text
    assert hostile not in text


def test_image_without_kaleido_names_the_extra(
    make_drift: Drifts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image needs the extra `paper`; the error names it, and no file is left behind."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "affectlens\[paper\]"'):
        plot(make_drift()).save(tmp_path / "c.pdf", venue="acl")

    assert [] == list(tmp_path.iterdir())


def test_unknown_suffix_and_venue_are_errors(make_drift: Drifts, tmp_path: Path) -> None:
    """An unknown suffix or venue is an error that lists the known ones."""
    with pytest.raises(TableError, match=r"can't write '.bmp'. Kinds: .html, .json, .png, .svg, .pdf"):
        plot(make_drift()).save(tmp_path / "c.bmp")
    with pytest.raises(TableError, match=r"no venue 'neurip'.*Did you mean 'neurips'"):
        plot(make_drift()).save(tmp_path / "c.json", venue="neurip")


@pytest.mark.parametrize(("venue", "width", "points"), [("acl", 6.30, 8), ("nature-column", 3.50, 7)])
def test_venue_sets_width_and_type(
    make_drift: Drifts, tmp_path: Path, venue: str, width: float, points: int
) -> None:
    """A figure for a venue has the venue's text width and type size, and no title."""
    spec = plot(make_drift(), title="Where")
    layout = json.loads(spec.save(tmp_path / "c.json", venue=venue).read_text("utf-8"))["layout"]

    assert round(width * 96) == layout["width"]
    assert points * 96 / 72 == pytest.approx(layout["font"]["size"])
    assert "" == layout["title"]["text"]
    assert "Where" == spec.figure.layout.title.text


def test_notebook_bundle_opens_nothing(make_drift: Drifts, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Jupyter a plot shows itself through a MIME bundle, whose plain text is its repr."""
    monkeypatch.setattr(builtins, "input", lambda: pytest.fail("asked something"))
    bundle = plot(make_drift())._repr_mimebundle_()

    assert bundle["text/plain"].startswith("Plot('map'")


def test_plot_is_public() -> None:
    """The class `Plot` can be imported for annotations."""
    assert "Plot" == Plot.__name__
