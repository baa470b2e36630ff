"""Result tables: a pandas frame that knows its origin, shows itself and saves by suffix.

`Drift`, `Trajectory`, `Agreement`, `Scores` and `Effects` are tables. The origin (sources and their hashes,
versions, seed, command; never an absolute path) is part of every file that a table is saved to, where the
format has a place for it.
"""

import json
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd

from affectlens import html, printable
from affectlens.errors import NoSuchSite, TableError, near, unmatched
from affectlens.files import whole
from affectlens.sites import Site, Sites
from affectlens.table_formats import READERS, WRITERS, flat, holds_arrays
from affectlens.table_schema import Columns, Shape, misshapen, required

SHOWN = 12  # rows of a repr
_WIDTH = 100  # characters of a sentence in a repr
_KEYS = ("tower", "stack", "layer", "role", "expert", "param", "label", "parameter")
_FOLDERS = re.compile(r"(?<![\w.~])/(?:[^/\s=]+/)*")  # those of an absolute path
_SOURCE: Shape = {"parameters": int | None, "bytes": int | float | None}
_ORIGIN: Shape = {  # what the origin of any table may contain
    "sources": {...: _SOURCE},
    "versions": {...: str},
    "command": str | list | None,
    "findings": [str],
    "custom": [str],  # columns of the user's own measures
}


@dataclass(frozen=True)
class Table:
    """Rows (a pandas frame that is never changed) and their origin (a JSON-like mapping)."""

    frame: pd.DataFrame
    origin: Mapping[str, Any] = field(default_factory=dict)

    schema: ClassVar[str] = "affectlens.table/1"
    rank: ClassVar[str] = ""  # the column that `top` sorts by if none is given
    shown: ClassVar[tuple[str, ...]] = ()  # the columns of a repr; all of them if empty
    flags: ClassVar[tuple[str, ...]] = ()  # columns of a repr that appear only if a row is false
    ranked: ClassVar[bool] = False  # a repr of many rows shows the highest ranks instead of the first rows
    bars: ClassVar[tuple[str, ...]] = ()  # columns with a bar behind each number in a notebook
    columns: ClassVar[tuple[Columns, ...]] = ({},)  # the columns a file must have, then optional groups
    about: ClassVar[Mapping[str, Shape]] = {}  # more entries that the origin may contain

    def where(self, **fields: Any) -> Self:
        """Keep the rows whose columns equal a value, are in a collection, or satisfy a function.

        Raises `TableError` for an unknown column and `NoSuchSite` when no row is left.
        """
        frame = self.frame
        for name, choice in fields.items():
            there = self._column(name)
            kept = frame[[_fits(value, choice) for value in frame[there]]]
            if kept.empty:
                known = sorted(frame[there].dropna().unique(), key=lambda one: (isinstance(one, str), one))
                raise NoSuchSite(unmatched("row", name, choice=choice, known=known))
            frame = kept
        return type(self)(frame.reset_index(drop=True), self.origin)

    def top(self, count: int, column: str = "") -> Self:
        """Keep the `count` rows with the largest values in a column; rows without a value are left out."""
        name = self._column(column or self.rank)
        frame = self.frame.dropna(subset=[name]).sort_values(name, ascending=False, kind="stable")
        return type(self)(frame.head(count).reset_index(drop=True), self.origin)

    def head(self, count: int = 5) -> Self:
        """Keep the first `count` rows."""
        return type(self)(self.frame.head(count).reset_index(drop=True), self.origin)

    @property
    def sites(self) -> Sites:
        """The sites of the rows, ready for an intervention."""
        if "parameter" not in self.frame.columns:
            kind = type(self).__name__
            raise TableError(f"the rows of {kind} are not sites: there is no column 'parameter'. Use a Drift")
        rows = self.frame.reindex(columns=list(_KEYS)).to_dict("records")
        return Sites(site_of(row) for row in rows)

    def to_pandas(self) -> pd.DataFrame:
        """Return a copy of the frame."""
        return self.frame.copy()

    def save(self, path: str | Path) -> Path:
        """Write the table, completely or not at all, as `.parquet`, `.csv`, `.json`, `.md` or `.tex`.

        Parquet and JSON contain the schema and the origin; a CSV has them in its first line, after `#`.
        """
        final = Path(path)
        with whole(final) as partial:
            WRITERS[_known(final)](self.frame, self._head, partial)
        return final

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table that `save` wrote as Parquet, CSV or JSON.

        Raises `TableError` for another file, and if a column or the origin has the wrong type.
        """
        final = Path(path)
        if final.suffix not in READERS:
            raise TableError(f"{final}: can't read {final.suffix!r}. Kinds: {', '.join(READERS)}")
        if not final.is_file():  # a pipe would block forever
            raise TableError(f"{final}: " + ("not an ordinary file" if final.exists() else "no such file"))
        try:
            frame, schema, origin = READERS[final.suffix](final)
            if not isinstance(origin, dict):
                raise TypeError("its origin is not a mapping")
        except Exception as error:  # parsers raise errors of many kinds on a damaged file
            why = printable.plain(repr(error))
            raise TableError(f"{final}: this is not a table of affectlens ({why})") from None
        if schema != cls.schema:
            raise TableError(f"{final}: this is {printable.plain(schema)}, expected {cls.schema}")
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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows, each a mapping from column to value; null is None."""
        names = list(self.frame.columns)
        for row in self.frame.astype(object).itertuples(index=False, name=None):
            yield {name: None if _null(value) else value for name, value in zip(names, row, strict=True)}

    def __repr__(self) -> str:
        words = (f"! {printable.sentence(notice)}" for notice in self.notices)
        lines = [textwrap.fill(one, _WIDTH, subsequent_indent="  ") for one in words]
        rows = (
            self._first()[self._shown()]
            .map(printable.cell)
            .rename(columns=printable.plain)
            .to_string(index=False)
        )
        more = [f"… {len(self) - SHOWN} more rows"] if len(self) > SHOWN else []
        lines += [printable.sentence(self.tally)] if self.tally else []
        return "\n".join([self.summary, *lines, rows, *more])

    def _repr_html_(self) -> str:
        names = self._shown()
        rows = self._first()[names].itertuples(index=False)
        # The maximum of the whole table, so that bars of its parts can be compared.
        barred = [name for name in self.bars if name in names and len(self)]
        most = {name: float(self.frame[name].astype(float).max()) for name in barred}
        drawn = html.table(names, [tuple(row) for row in rows], caption=self.summary, most=most)
        lines = [f"! {notice}" for notice in self.notices] + ([self.tally] if self.tally else [])
        above = "".join(f"<p>{html.text(printable.sentence(line))}</p>" for line in lines)
        return f'<div class="{html.NO_FORMULAS}">{above}{drawn}</div>' if lines else drawn

    @property
    def notices(self) -> tuple[str, ...]:
        """The sentences at the top of a repr, which a reader must not overlook."""
        return tuple(map(str, self.origin.get("findings", ())))

    @property
    def tally(self) -> str:
        """One more line of a repr, such as a count of everything that was compared."""
        return ""

    @property
    def summary(self) -> str:
        """One line: the kind of table, its rows and its sources."""
        of = self._named("").removeprefix(", ")
        return f"{type(self).__name__}: {len(self)} rows" + (f", {of}" if of else "")

    @property
    def title(self) -> str:
        """The kind of table and its sources."""
        return self._named(type(self).__name__)

    def _named(self, what: str) -> str:
        """Return what a table or a part of it is, and of which sources."""
        sources = self.origin.get("sources", {})
        names = {side: printable.plain(source.get("name", "?")) for side, source in sources.items()}
        control = f" (control: {names.pop('control')})" if "control" in names else ""
        of = " → ".join(names.values()) + control
        return f"{what}, {of}" if of else what

    def _shown(self) -> list[str]:
        names = [name for name in self.shown or flat(self.frame).columns if name in self.frame]
        return [name for name in names if name not in self.flags or self.frame[name].eq(False).any()]

    def _first(self) -> pd.DataFrame:
        """Return the rows of a repr: the highest ranks, unless the table is already sorted, as by `top`."""
        frame, names = self.frame, [name for name in (self.rank, *self.bars) if name in self.frame]
        ordered = any(frame[n].is_monotonic_decreasing and frame[n].nunique() > 1 for n in names)
        if self.ranked and self.rank in frame and len(frame) > SHOWN and not ordered:
            frame = frame.sort_values(self.rank, ascending=False, kind="stable")
        return frame.head(SHOWN)

    def _column(self, name: str) -> str:
        if name not in self.frame.columns:
            raise TableError(f"no column {name!r}. Columns: {near(name, self.frame.columns, most=30)}")
        if holds_arrays(self.frame[name]):
            raise TableError(f"column {name!r} has an array in each row, which can't be sorted or compared")
        return name


def site_of(row: Mapping[Any, Any]) -> Site:
    """Make the site that a row of a table describes."""
    known: dict[str, Any] = {name: row[name] for name in _KEYS if name in row and not pd.isna(row[name])}
    for name in ("layer", "expert"):
        if name in known:
            known[name] = int(known[name])
    return Site(**known)


@cache
def versions() -> dict[str, str]:
    """Find the versions of the installed packages that a result depends on."""
    found = {}
    for name in ("affectlens", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, Any]:
    """Describe how a result was made: the versions, and the command line if there was one."""
    found: dict[str, Any] = {"versions": dict(versions())}
    program = Path(sys.argv[0])
    if "affectlens" in (program.name, program.parent.name):
        words = (_FOLDERS.sub("", word) for word in sys.argv[1:])  # a result must not name its machine
        found["command"] = " ".join(("affectlens", *words))
    return found


def writable(path: str | Path) -> Path:
    """Return the path if a table can be saved there; call it before the work. Raises `TableError` if not."""
    final = Path(path)
    _known(final)
    try:
        folder = _existing(final.parent)
        free = final.is_file() or not final.exists()
        fits = free and folder.is_dir() and os.access(folder, os.W_OK)
    except OSError:  # the name is too long
        fits = False
    if not fits:
        why = "its folder is read-only or a file, or its name is taken or too long"
        raise TableError(f"{final}: can't be written: {why}. Choose another path")
    return final


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder == folder.parent else _existing(folder.parent)


def _known(path: Path) -> str:
    if path.suffix not in WRITERS:
        raise TableError(f"{path.name}: can't write {path.suffix!r}. Kinds: {', '.join(WRITERS)}")
    return path.suffix


def _null(value: Any) -> bool:
    return pd.api.types.is_scalar(value) and bool(pd.isna(value))


def _fits(value: Any, choice: Any) -> bool:
    if pd.isna(value):
        return choice is None
    if callable(choice):
        return bool(choice(value))
    if isinstance(choice, Collection) and not isinstance(choice, str):
        return value in choice
    return bool(value == choice)
