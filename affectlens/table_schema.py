"""What a table that was read has to hold: the kind of each column, and the shape of its origin.

A saved table may come from a stranger. A class of tables declares what it can't do without, and what is read
is held to it once, so that nothing that works on a table has to doubt it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from affectlens.errors import TableError
from affectlens.printable import plain

Columns = Mapping[str, str]  # name → kind, with `?` after it where cells may be null
# A type; `[shape]`, a list of it; `{...: shape}`, a mapping to it; `{"key": shape}`, where a key may lack.
Shape = Any
LARGEST = 2**63  # no count is larger, and what is can't be drawn or summed


def _text(cell: Any) -> bool:
    """Half of a surrogate pair is no text, and can't be written."""
    return isinstance(cell, str) and cell == cell.encode("utf-8", "ignore").decode()


def _number(cell: Any) -> bool:
    return isinstance(cell, float) or (type(cell) is int and abs(cell) <= LARGEST)


def _count(cell: Any) -> bool:
    return _number(cell) and 0 <= cell < LARGEST and float(cell).is_integer()


def _array(cell: Any) -> bool:
    return isinstance(cell, np.ndarray) and cell.ndim == 1 and cell.dtype.kind in "fiu"


_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", _text),
    "number": ("numbers", _number),
    "count": ("whole numbers from 0", _count),
    "boolean": ("true or false", lambda cell: isinstance(cell, bool)),
    "array": ("arrays of numbers", _array),
}


def required(frame: pd.DataFrame, columns: tuple[Columns, ...]) -> pd.DataFrame:
    """Return the frame, its numbers as numbers, if it has the columns; raises `TableError` if not.

    The first columns have to be there; of each further group all or none. Others may be there too.
    """
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise TableError(f"two columns are called {plain(twice)}")
    for at, group in enumerate(columns):
        missing = [name for name in group if name not in frame]
        if missing and (at == 0 or len(missing) < len(group)):
            raise TableError(f"column {missing[0]!r} is missing")
    kinds = {name: kind for group in columns for name, kind in group.items() if name in frame}
    for name, kind in kinds.items():
        _check(frame[name], kind)
    numbers = [name for name, kind in kinds.items() if kind.startswith(("number", "count"))]
    # Where all cells are null, a file may say nothing of their kind.
    return frame.astype({name: float for name in numbers if frame[name].dtype == object})


def _check(column: pd.Series, kind: str) -> None:
    words, fits = _KINDS[kind.removesuffix("?")]
    null = column.isna()
    if null.any() and not kind.endswith("?"):
        raise TableError(f"column {column.name!r} has to hold {words}, and row {null.argmax() + 1} is null")
    for row, cell in enumerate(column.tolist()):
        if not null.iat[row] and not fits(cell):
            told = f"row {row + 1} has {plain(repr(cell), 40)}"
            raise TableError(f"column {column.name!r} has to hold {words}, and {told}")


def misshapen(value: Any, shape: Shape, *, path: str = "origin") -> Iterator[str]:
    """Say where a value of JSON has not the shape."""
    kind: Any = type(shape) if isinstance(shape, list | dict) else shape
    if not isinstance(value, kind) or (isinstance(value, int) and abs(value) > LARGEST):
        names = {list: "a list", dict: "a mapping", str: "text"}
        words = names.get(kind, str(kind))
        yield f"{path} has to be {words}, not {plain(repr(value), 40)}"
    elif isinstance(shape, list):
        for at, one in enumerate(value):
            yield from misshapen(one, shape[0], path=f"{path}[{at}]")
    elif isinstance(shape, dict):
        for key, one in value.items():
            if (inner := shape.get(key, shape.get(...))) is not None:
                yield from misshapen(one, inner, path=f"{path}.{plain(key, 40)}")
