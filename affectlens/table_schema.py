"""Check a table that was read: the type of each column, and the structure of its origin.

A saved table may come from a stranger. Each class of tables declares the columns and entries that it relies
on; `Table.load` checks them once, so that no other code has to.
"""

from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, get_args

import numpy as np
import pandas as pd

from affectlens.errors import TableError
from affectlens.printable import plain

Columns = Mapping[str, str]  # name → kind, with `?` if cells may be null
# A type; `[shape]` for a list of it; `{...: shape}` for a mapping to it; `{"key": shape}`, each key optional.
Shape = Any
LARGEST = 2**63  # no count is larger, and a larger number can't be drawn or summed
_WORDS = {
    list: "a list", dict: "a mapping", str: "text", bool: "true or false", int: "a whole number",
    float: "a number", NoneType: "null",
}  # fmt: skip


def required(frame: pd.DataFrame, columns: tuple[Columns, ...]) -> pd.DataFrame:
    """Return the frame, with numeric types for numbers, if it has the columns. Raises `TableError` if not.

    All of the first group must be there, and all or none of every further group. More columns are allowed.
    """
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise TableError(f"two columns have the name {plain(twice)}")
    for at, group in enumerate(columns):
        missing = [name for name in group if name not in frame]
        if missing and (at == 0 or len(missing) < len(group)):
            raise TableError(f"column {missing[0]!r} is missing")
    kinds = {name: kind for group in columns for name, kind in group.items() if name in frame}
    for name, kind in kinds.items():
        _check(frame[name], kind)
    numbers = [name for name, kind in kinds.items() if kind.startswith(("number", "count"))]
    # A file may not say what type a column has whose cells are all null.
    return frame.astype({name: float for name in numbers if frame[name].dtype == object})


def misshapen(value: Any, shape: Shape, *, path: str = "origin") -> Iterator[str]:
    """Yield a sentence for each place where a JSON value does not have the shape."""
    kind: Any = type(shape) if isinstance(shape, list | dict) else shape
    if not isinstance(value, kind) or (isinstance(value, int) and abs(value) > LARGEST):
        yield f"{path} must be {_either(kind)}, not {plain(repr(value), 40)}"
    elif isinstance(shape, list):
        for at, one in enumerate(value):
            yield from misshapen(one, shape[0], path=f"{path}[{at}]")
    elif isinstance(shape, dict):
        for key, one in value.items():
            if (inner := shape.get(key, shape.get(...))) is not None:
                yield from misshapen(one, inner, path=f"{path}.{plain(key, 40)}")


def _either(kind: Any) -> str:
    kinds = get_args(kind) or (kind,)
    return " or ".join(_WORDS[one] for one in kinds if one is not int or float not in kinds)


def _check(column: pd.Series, kind: str) -> None:
    words, fits = _KINDS[kind.removesuffix("?")]
    null = column.isna()
    if null.any() and not kind.endswith("?"):
        raise TableError(f"column {column.name!r} must hold {words}, but row {null.argmax() + 1} is null")
    for row, cell in enumerate(column.tolist()):
        if not null.iat[row] and not fits(cell):
            there = f"row {row + 1} has {plain(repr(cell), 40)}"
            raise TableError(f"column {column.name!r} must hold {words}, but {there}")


def _text(cell: Any) -> bool:
    # Half a surrogate pair can't be encoded, so it could not be saved again.
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
