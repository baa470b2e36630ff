"""A pandas frame that prints in full, such as the ledger that comes with a result."""

import shutil

import pandas as pd

from affectlens import html, printable

_ROWS = 60  # that a print shows; pandas has the same limit


class WholeFrame(pd.DataFrame):
    """A frame whose print keeps every column and every word, wrapped to the terminal.

    pandas leaves columns out and cuts long cells. A selection or aggregation of it is an ordinary frame.
    """

    def __repr__(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        more = [f"… {len(self) - _ROWS} more rows"] if len(self) > _ROWS else []
        cells = [
            [printable.sentence(value) if isinstance(value, str) else printable.cell(value) for value in row]
            for row in self._first()
        ]
        return "\n".join([printable.aligned(self._names(), cells, width=width), *more])

    def _repr_html_(self) -> str:
        caption = f"{_ROWS} of {len(self)} rows" if len(self) > _ROWS else ""
        return html.table(self._names(), self._first(), caption=caption)

    def _names(self) -> list[str]:
        return list(map(str, self.columns))

    def _first(self) -> list[tuple[object, ...]]:
        return list(self.head(_ROWS).itertuples(index=False, name=None))
