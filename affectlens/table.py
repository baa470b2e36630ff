"""Result tables: a pandas frame that knows where it came from, shows itself and saves by suffix.

`Drift`, `Scores` and `Effects` are tables. The origin (sources and their hashes, versions, seed,
command; never an absolute path) travels inside every file written.
"""

import json
import os
import re
import sys
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd

from affectlens import html, printable
from affectlens.errors import NoSuchSite, TableError, near
from affectlens.files import whole
from affectlens.sites import Site, Sites
from affectlens.table_formats import READERS, WRITERS, flat, holds_arrays
from affectlens.table_schema import Columns, Shape, misshapen, required

_KEYS = ("tower", "stack", "layer", "role", "expert", "param", "label", "parameter")
_FOLDER = re.compile(r"(?<![\w.~])/(?:[^/\s=]+/)*")  # the folders of an absolute path
SHOWN = 12
_SOURCE: Shape = {"parameters": int | None, "bytes": int | float | None}
_ORIGIN: Shape = {  # what tables of every class may state
    "sources": {...: _SOURCE},
    "versions": {...: str},
    "command": str | list | None,
    "findings": [str],
    "custom": [str],  # columns of the user's own measures
}
_WIDTH = 100  # of a sentence on a terminal


@cache
def versions() -> dict[str, str]:
    """The versions of what a result rests on, of the packages that are installed."""
    found = {}
    for name in ("affectlens", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def writable(path: str | Path) -> Path:
    """Return the path if a table can be written there; raises `TableError`, before any work, if not."""
    final = Path(path)
    _known(final)
    try:
        folder = _existing(final.parent)
        free = final.is_file() or not final.exists()
        fits = free and folder.is_dir() and os.access(folder, os.W_OK)
    except OSError:  # a name that is too long
        fits = False
    if not fits:
        raise TableError(f"{final}: can't write there")
    return final


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder == folder.parent else _existing(folder.parent)


def provenance() -> dict[str, Any]:
    """What every result says of its making: versions, and the command line if there was one."""
    found: dict[str, Any] = {"versions": dict(versions())}
    program = Path(sys.argv[0])
    if "affectlens" in (program.name, program.parent.name):
        words = (_FOLDER.sub("", word) for word in sys.argv[1:])
        found["command"] = " ".join(("affectlens", *words))
    return found


@dataclass(frozen=True)
class Table:
    """Hold rows (a pandas frame, never changed) and their origin (a JSON-like mapping)."""

    frame: pd.DataFrame
    origin: Mapping[str, Any] = field(default_factory=dict)

    schema: ClassVar[str] = "affectlens.table/1"
    rank: ClassVar[str] = ""  # the column `top` sorts by unless told otherwise
    shown: ClassVar[tuple[str, ...]] = ()  # the columns a repr shows
    flags: ClassVar[tuple[str, ...]] = ()  # of these, the ones that are shown only if a row is false
    ranked: ClassVar[bool] = False  # whether a repr of many rows shows those that rank highest
    bars: ClassVar[tuple[str, ...]] = ()  # of these, the ones with a bar behind each number in a notebook
    columns: ClassVar[tuple[Columns, ...]] = ({},)  # what has to be there, then groups of what may be
    about: ClassVar[Mapping[str, Shape]] = {}  # what an origin looks like, beside what all tables state

    def where(self, **fields: Any) -> Self:
        """Keep the rows whose columns equal a value, lie in a collection or satisfy a function.

        Raises `TableError` for an unknown column and `NoSuchSite` when no row is left.
        """
        frame = self.frame
        for name, choice in fields.items():
            there = self._column(name)
            kept = frame[[_fits(value, choice) for value in frame[there]]]
            if kept.empty:
                known = sorted({str(value) for value in frame[there]})
                raise NoSuchSite(f"no row has {name}={choice!r}. Here: {near(choice, known)}")
            frame = kept
        return type(self)(frame.reset_index(drop=True), self.origin)

    def top(self, count: int, column: str = "") -> Self:
        """Keep the `count` rows with the largest value in a column; nulls are never among them."""
        name = self._column(column or self.rank)
        frame = self.frame.dropna(subset=[name]).sort_values(name, ascending=False, kind="stable")
        return type(self)(frame.head(count).reset_index(drop=True), self.origin)

    @property
    def sites(self) -> Sites:
        """The sites of the rows, ready for an intervention."""
        if "parameter" not in self.frame.columns:
            raise TableError(f"a {type(self).__name__} table has no one site a row")
        rows = self.frame.reindex(columns=list(_KEYS)).to_dict("records")
        return Sites(site_of(row) for row in rows)

    def to_pandas(self) -> pd.DataFrame:
        """Return a copy of the frame."""
        return self.frame.copy()

    def save(self, path: str | Path) -> Path:
        """Write the table, whole or not at all, as `.parquet .csv .json .md` or `.tex`.

        Parquet and JSON carry schema and origin inside; a CSV has them in its first line, after `#`.
        """
        final = Path(path)
        with whole(final) as partial:
            WRITERS[_known(final)](self.frame, self._head, partial)
        return final

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what `save` wrote as Parquet, CSV or JSON.

        Raises `TableError` for another kind, and where a column or the origin is not what it has to be.
        """
        final = Path(path)
        if final.suffix not in READERS:
            raise TableError(f"{final}: tables are read from {', '.join(READERS)}")
        if not final.is_file():  # a pipe would block for ever
            raise TableError(f"{final}: " + ("not an ordinary file" if final.exists() else "no such file"))
        try:
            frame, schema, origin = READERS[final.suffix](final)
            if not isinstance(origin, dict):
                raise TypeError("its origin is no mapping")
        except Exception as error:  # what parsers raise on a damaged file is theirs to choose
            why = printable.plain(repr(error))
            raise TableError(f"{final}: this is not a table of affectlens ({why})") from None
        if schema != cls.schema:
            raise TableError(f"{final}: holds {printable.plain(schema)}, not {cls.schema}")
        for wrong in misshapen(origin, {**_ORIGIN, **cls.about}):
            raise TableError(f"{final}: {wrong}")
        measured = {str(name): "number?" for name in origin.get("custom", ()) if name in frame}
        try:
            return cls(required(frame, (*cls.columns, measured)), origin)
        except TableError as error:
            raise TableError(f"{final}: {error}") from None

    @property
    def _head(self) -> str:
        return json.dumps({"schema": self.schema, "origin": dict(self.origin)}, allow_nan=False)

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        words = (f"! {printable.sentence(notice)}" for notice in self.notices)
        told = [textwrap.fill(one, _WIDTH, subsequent_indent="  ") for one in words]
        rows = (
            self._first()[self._shown()]
            .map(printable.cell)
            .rename(columns=printable.plain)
            .to_string(index=False)
        )
        more = [f"… {len(self) - SHOWN} more rows"] if len(self) > SHOWN else []
        told += [printable.sentence(self.tally)] if self.tally else []
        return "\n".join([self.summary, *told, rows, *more])

    def _repr_html_(self) -> str:
        names = self._shown()
        rows = self._first()[names].itertuples(index=False)
        # Of the whole table, so that the bars of a part of it can be compared.
        barred = [name for name in self.bars if name in names and len(self)]
        most = {name: float(self.frame[name].astype(float).max()) for name in barred}
        drawn = html.table(names, [tuple(row) for row in rows], caption=self.summary, most=most)
        told = [f"! {notice}" for notice in self.notices] + ([self.tally] if self.tally else [])
        above = "".join(f"<p>{html.text(printable.sentence(line))}</p>" for line in told)
        return f'<div class="{html.NO_FORMULAS}">{above}{drawn}</div>' if told else drawn

    @property
    def notices(self) -> tuple[str, ...]:
        """The sentences a repr begins with: what must not be overlooked."""
        return tuple(map(str, self.origin.get("findings", ())))

    @property
    def tally(self) -> str:
        """One more line of a repr: what became of everything that was compared."""
        return ""

    @property
    def summary(self) -> str:
        """One line: what this is and of what."""
        sources = self.origin.get("sources", {})
        names = {side: printable.plain(source.get("name", "?")) for side, source in sources.items()}
        control = f" (control: {names.pop('control')})" if "control" in names else ""
        of = " → ".join(names.values()) + control
        return f"{type(self).__name__}: {len(self)} rows" + (f", {of}" if of else "")

    def _shown(self) -> list[str]:
        names = [name for name in self.shown or flat(self.frame).columns if name in self.frame]
        return [name for name in names if name not in self.flags or self.frame[name].eq(False).any()]

    def _first(self) -> pd.DataFrame:
        """The rows that a repr shows: those that rank highest, unless `top` has put them in an order."""
        frame, names = self.frame, [name for name in (self.rank, *self.bars) if name in self.frame]
        ordered = any(frame[n].is_monotonic_decreasing and frame[n].nunique() > 1 for n in names)
        if self.ranked and self.rank in frame and len(frame) > SHOWN and not ordered:
            frame = frame.sort_values(self.rank, ascending=False, kind="stable")
        return frame.head(SHOWN)

    def _column(self, name: str) -> str:
        if name not in self.frame.columns:
            raise TableError(f"no column {name!r}. Columns: {near(name, self.frame.columns, most=30)}")
        if holds_arrays(self.frame[name]):
            raise TableError(f"column {name!r} holds an array a row: no order and no value to compare with")
        return name


def _fits(value: Any, choice: Any) -> bool:
    if pd.isna(value):
        return choice is None
    if callable(choice):
        return bool(choice(value))
    if isinstance(choice, Collection) and not isinstance(choice, str):
        return value in choice
    return bool(value == choice)


def site_of(row: Mapping[Any, Any]) -> Site:
    """The site that a row of a table speaks of."""
    known: dict[str, Any] = {name: row[name] for name in _KEYS if name in row and not pd.isna(row[name])}
    for name in ("layer", "expert"):
        if name in known:
            known[name] = int(known[name])
    return Site(**known)


def _known(path: Path) -> str:
    if path.suffix not in WRITERS:
        raise TableError(f"{path.name}: can't write {path.suffix!r}. Kinds: {', '.join(WRITERS)}")
    return path.suffix
