"""Plots: immutable specs of a figure of one table; nothing is computed before the plot is shown or saved."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.errors import MissingExtra, TableError, near
from affectlens.files import whole, write_text
from affectlens.printable import plain
from affectlens.table import Table
from affectlens.views.figures.drift_map import drift_map
from affectlens.views.figures.effect_panels import effect_panels
from affectlens.views.figures.neuron_curves import neuron_curves
from affectlens.views.figures.norms import norm_contrast, role_bars
from affectlens.views.figures.style import fitted
from affectlens.views.report.page import figure, page

# One row a figure: the table it draws, its kind, and a function whose first argument is the table and whose
# others are the options. The first row of a table is what `plot(table)` draws.
FIGURES: tuple[tuple[type[Table], str, Callable[..., go.Figure]], ...] = (
    (Drift, "map", drift_map),
    (Drift, "roles", role_bars),
    (Drift, "contrast", norm_contrast),
    (Drift, "neurons", neuron_curves),
    (Effects, "effects", effect_panels),
)
IMAGES = (".png", ".svg", ".pdf")
SUFFIXES = (".html", ".json", *IMAGES)


@dataclass(frozen=True, repr=False, eq=False)
class Plot:
    """A spec of a figure: its kind, a table, and options of that kind (`measure`, `metric`, `title`, …).

    >>> import affectlens as al
    >>> base, tuned, *_ = al.load_demo()
    >>> contrast = al.Plot("contrast", al.diff(base, tuned, progress=False), {"title": "Gate against up"})
    >>> contrast
    Plot('contrast' of Drift, base → tuned, title='Gate against up')
    >>> contrast.figure.layout.xaxis.title.text
    'gate_proj / up_proj (median)'
    """

    kind: str
    table: Table
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def figure(self) -> go.Figure:
        """The Plotly figure, drawn anew at each access."""
        draw = _kinds(self.table)[self.kind]
        return draw(self.table, **self.options)

    def save(self, path: str | Path, *, venue: str | None = None) -> Path:
        """Write the figure as `.html` (one file, no network), `.json`, or with kaleido as `.png .svg .pdf`.

        `venue` sets width and type size: `"acl"`, `"acl-column"`, `"neurips"`, `"nature"`, … Raises
        `TableError` for an unknown suffix or venue, `MissingExtra` for an image without kaleido.
        """
        final = Path(path)
        if final.suffix not in SUFFIXES:
            raise TableError(f"{final.name}: can't write {final.suffix!r}. Kinds: {', '.join(SUFFIXES)}")
        if final.suffix in IMAGES and importlib.util.find_spec("kaleido") is None:
            raise MissingExtra(
                f"{final.name}: images need kaleido, which isn't installed. "
                'Try: pip install "affectlens[paper]", or save .html'
            )
        drawn = self.figure if venue is None else fitted(self.figure, venue)
        if final.suffix == ".html":
            write_text(final, page(self._title, figure(drawn)))
        elif final.suffix == ".json":
            write_text(final, drawn.to_json())
        else:
            with whole(final) as partial:
                # A PNG has 300 dots an inch, as printers ask; SVG and PDF are vectors and keep their size.
                drawn.write_image(partial, scale=300 / 96 if final.suffix == ".png" else 1)
        return final

    @property
    def _title(self) -> str:
        return str(self.options.get("title") or f"affectlens: {self.kind}")

    def __repr__(self) -> str:
        options = "".join(f", {name}={plain(value)!r}" for name, value in self.options.items())
        return f"Plot({self.kind!r} of {self.table.title}{options})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        # Plotly's own bundle follows the renderer that the notebook has chosen, and opens no window.
        shown = self.figure._repr_mimebundle_(include, exclude) or {}
        return {"text/plain": repr(self), **shown}


def plot(table: Table, kind: str | None = None, **options: object) -> Plot:
    """Plot a table: a `Drift` as `"map"`, `"roles"`, `"contrast"` or `"neurons"`, `Effects` as `"effects"`.

    Without a kind, the first of the table's kinds is drawn; `"neurons"` needs
    `diff(…, detail="neurons")`. Raises `TableError` for an unknown table, kind or option.

    >>> import affectlens as al
    >>> base, tuned, *_ = al.load_demo()
    >>> spec = al.plot(al.diff(base, tuned, progress=False), measure="rms")
    >>> spec
    Plot('map' of Drift, base → tuned, measure='rms')
    >>> spec.figure.layout.xaxis.ticktext
    ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
    """
    kinds = _kinds(table)
    chosen = next(iter(kinds)) if kind is None else kind
    if chosen not in kinds:
        raise TableError(f"no plot {chosen!r} of a {type(table).__name__}. Kinds: {near(chosen, kinds)}")
    known = list(inspect.signature(kinds[chosen]).parameters)[1:]
    for name in options:
        if name not in known:
            raise TableError(f"plot {chosen!r} has no option {name!r}. Options: {near(name, known)}")
    return Plot(chosen, table, options)


def _kinds(table: Table) -> dict[str, Callable[..., go.Figure]]:
    kinds = {kind: draw for type_, kind, draw in FIGURES if isinstance(table, type_)}
    if not kinds:
        names = ", ".join(dict.fromkeys(type_.__name__ for type_, *_ in FIGURES))
        raise TableError(f"no plot of a {type(table).__name__}. Tables with plots: {names}")
    return kinds
