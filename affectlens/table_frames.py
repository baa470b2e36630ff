"""A pandas frame that prints in full, such as the ledger that comes with a result."""

import shutil
from collections.abc import Sequence
from typing import ClassVar

import pandas as pd

from affectlens import html, printable

_INTERNAL: list[str] = pd.DataFrame._internal_names  # type: ignore[attr-defined]
_ROWS = 60  # that a print shows; pandas has the same limit


class WholeFrame(pd.DataFrame):
    """A frame that prints like a result: a title, whole cells wrapped to the terminal, and named columns.

    pandas leaves columns out and cuts long cells. A selection or aggregation of it is an ordinary frame.
    """

    # pandas takes these for attributes and not for columns, and drops them from what is made of the frame.
    _internal_names: ClassVar[list[str]] = [*_INTERNAL, "title", "shown", "bars"]
    _internal_names_set: ClassVar[set[str]] = set(_internal_names)
    title: str = ""
    shown: Sequence[str] = ()  # the columns of a print; all of them if empty
    bars: Sequence[str] = ()  # columns with a bar behind each number in a notebook

    @classmethod
    def of(
        cls, frame: pd.DataFrame, title: str, *, shown: Sequence[str] = (), bars: Sequence[str] = ()
    ) -> "WholeFrame":
        """Give a frame a title, and name the columns that it prints."""
        found = cls(frame)
        found.title, found.shown, found.bars = title, shown, bars
        return found

    def __repr__(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        more = [f"… {len(self) - _ROWS} more rows"] if len(self) > _ROWS else []
        cells = [
            [printable.sentence(value) if isinstance(value, str) else printable.cell(value) for value in row]
            for row in self._first()
        ]
        above = [printable.sentence(self.title)] if self.title else []
        return "\n".join([*above, printable.aligned(self._names(), cells, width=width), *more, *self._also()])

    def _repr_html_(self) -> str:
        cut = f"{_ROWS} of {len(self)} rows" if len(self) > _ROWS else ""
        most = {
            name: float(self[name].astype(float).max()) for name in self.bars if name in self and len(self)
        }
        caption = ": ".join(filter(None, (self.title, cut)))
        drawn = html.table(self._names(), self._first(), caption=caption, most=most)
        return drawn + "".join(f"<p>{html.text(words)}</p>" for words in self._also())

    def _names(self) -> list[str]:
        return [name for name in self.shown if name in self] or list(map(str, self.columns))

    def _also(self) -> list[str]:
        left = [str(name) for name in self.columns if self.shown and name not in self.shown]
        return [f"more columns: {', '.join(map(printable.plain, left))}"] if left else []

    def _first(self) -> list[tuple[object, ...]]:
        rows = self.head(_ROWS)
        rows = rows[self._names()] if self.shown else rows
        return list(rows.itertuples(index=False, name=None))
