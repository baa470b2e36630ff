"""The file formats of a table: a writer for each suffix, and a reader for those that lose nothing.

A writer takes a frame and its head (schema and origin, as JSON), which is stored in Parquet and JSON, and in
the first line of a CSV. A name may contain anything, so each format escapes what its readers would run or
render.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from affectlens import printable

MOST = 50_000_000  # cells of a Parquet file that is read
Read = tuple[pd.DataFrame, str, dict[str, Any]]  # frame, schema, origin
# A spreadsheet runs a cell that begins with one of these as a formula, some skip blanks before it. A cell may
# begin after any separator, even inside quotes: a program that expects another separator ignores them.
_FORMULA = r"(?=[=+\-@\uff1d\uff0b\uff0d\uff20\t\r\n])"
_BLANK = r"(?:[^\S\t\r\n]|[\0-\x08\x0e-\x1f\x7f\ufeff])*"
_BEGIN = re.compile(rf"((?:^|[,;\t\r\n]){_BLANK})('*){_FORMULA}")
_QUOTED = re.compile(rf"((?:^|[,;\t\r\n]){_BLANK})'('*){_FORMULA}")
_WORDS = {"str": str, "str?": str}
_DTYPES = {kind: kind for kind in ("bool", "boolean", "int64", "Int64", "float64")} | _WORDS
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # of JSON
_INSIDE = re.compile(rf"[,;](?={_BLANK}{_FORMULA})")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert the rows of a frame to strict JSON values: every digit is kept, NaN becomes null."""
    kept = frame.astype(object).where(frame.notna(), None)
    return [{str(k): _plain(v) for k, v in row.items()} for row in kept.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop the columns of arrays, for formats with a number or a word in each cell."""
    return frame[[name for name in frame if not holds_arrays(frame[name])]]


def holds_arrays(column: pd.Series) -> bool:
    """Return True if a cell of the column is an array."""
    return column.dtype == object and any(isinstance(cell, np.ndarray) for cell in column)


def _to_parquet(frame: pd.DataFrame, head: str, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.Table.from_pandas(frame, preserve_index=False)
    metadata = {**(rows.schema.metadata or {}), b"affectlens": head.encode()}
    pq.write_table(rows.replace_schema_metadata(metadata), path)


def _from_parquet(path: Path) -> Read:
    import pyarrow.parquet as pq

    stated = pq.read_metadata(path)
    count = sum(stated.row_group(at).num_rows for at in range(stated.num_row_groups))
    if count * stated.num_columns > MOST:  # a billion equal cells fit into a few bytes
        raise ValueError(f"{count:,} rows × {stated.num_columns} columns exceed {MOST:,} cells")
    rows = pq.read_table(path)
    head = json.loads((rows.schema.metadata or {})[b"affectlens"])
    return rows.to_pandas(), head["schema"], head["origin"]


def _to_csv(frame: pd.DataFrame, head: str, path: Path) -> None:
    safe = flat(frame)
    kinds = _kinds(safe)
    for name, kind in kinds.items():
        if kind in _WORDS:
            safe[name] = safe[name].map(partial(_quoted, nulls=kind == "str?"), na_action="ignore")
    head = _STRING.sub(_one_cell, f'{head[:-1]}, "columns": {json.dumps(kinds)}}}')
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.write(f"# {head}\n")
        safe = safe.rename(columns=_quoted)
        # With minimal quoting, a carriage return in a name would end the row.
        safe.to_csv(stream, index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def _from_csv(path: Path) -> Read:
    with path.open(encoding="utf-8", newline="") as stream:
        head = json.loads(stream.readline().removeprefix("# "))
        kinds = head["columns"]
        dtypes = {_quoted(name): dtype for name, kind in kinds.items() if (dtype := _DTYPES.get(kind))}
        # A null is an empty cell, so that a checkpoint may have the name "nan".
        frame = pd.read_csv(stream, dtype=dtypes, keep_default_na=False, na_values=[""])
    frame.columns = list(kinds)
    for name in (name for name, kind in kinds.items() if kind in _WORDS):
        column = frame[name].fillna("") if kinds[name] == "str" else frame[name]
        frame[name] = column.map(partial(_unquoted, nulls=kinds[name] == "str?"), na_action="ignore")
    return frame, head["schema"], head["origin"]


def _kinds(frame: pd.DataFrame) -> dict[str, str]:
    """Map each column to its type, for formats that don't store it; `str?` marks text with nulls."""
    return {str(name): _kind(column) for name, column in frame.items()}


def _kind(column: pd.Series) -> str:
    there = column.dropna()
    if column.dtype == object or isinstance(column.dtype, pd.StringDtype):
        words = "str" if len(there) == len(column) else "str?"
        return words if all(isinstance(cell, str) for cell in there) else "object"
    return str(column.dtype)


def _quoted(text: str, *, nulls: bool = False) -> str:
    """Put a quote before a formula, and before an empty cell if that could be read as a null."""
    return f"'{text}" if nulls and set(text) <= {"'"} else _BEGIN.sub(r"\1'\2", text)


def _unquoted(text: str, *, nulls: bool) -> str:
    return text[1:] if nulls and set(text) <= {"'"} else _QUOTED.sub(r"\1\2", text)


def _one_cell(string: re.Match[str]) -> str:
    """Escape the commas and semicolons in a string of the head that could begin a formula."""
    return _INSIDE.sub(lambda found: f"\\u{ord(found[0]):04x}", string[0])


def _to_json(frame: pd.DataFrame, head: str, path: Path) -> None:
    body = json.dumps({"columns": _kinds(frame), "rows": records(frame)}, allow_nan=False)
    path.write_text(f"{head[:-1]}, {body[1:]}", "utf-8")


def _from_json(path: Path) -> Read:
    head = json.loads(path.read_text("utf-8"))
    frame = pd.DataFrame(head["rows"], columns=list(head["columns"]), dtype=object)
    for name, kind in head["columns"].items():
        cells = frame[name]
        if any(isinstance(cell, list) for cell in cells):
            arrays = [np.asarray(cell, float) if isinstance(cell, list) else None for cell in cells]
            frame[name] = pd.Series(arrays, index=frame.index, dtype=object)
        else:
            frame[name] = cells.infer_objects() if kind in _WORDS else cells.astype(_DTYPES.get(kind, object))
    return frame, head["schema"], head["origin"]


def _to_markdown(frame: pd.DataFrame, head: str, path: Path) -> None:
    def row(cells: Collection[Any]) -> str:
        return "| " + " | ".join(printable.number(cell).translate(_MARKDOWN) for cell in cells) + " |"

    frame = flat(frame)
    names = list(frame.columns)
    body = [row(cells) for cells in frame.itertuples(index=False)]
    path.write_text("\n".join([row(names), "|" + " --- |" * len(names), *body, ""]), "utf-8")


def _to_latex(frame: pd.DataFrame, head: str, path: Path) -> None:
    def row(cells: Collection[Any]) -> str:
        return " & ".join(printable.number(cell).translate(_LATEX) for cell in cells) + r" \\"

    frame = flat(frame)
    names = list(frame.columns)
    body = [row(cells) for cells in frame.itertuples(index=False)]
    lines = [rf"\begin{{tabular}}{{{'l' * len(names)}}}", r"\toprule", row(names), r"\midrule"]
    path.write_text("\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}", ""]), "utf-8")


# Most viewers of Markdown render HTML, some typeset what is between two $. An underscore in a word is safe.
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*[]|!~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"[": "{[}", "*": "{*}"}  # after \\ or \toprule LaTeX reads these as an argument
)


WRITERS: Mapping[str, Callable[[pd.DataFrame, str, Path], None]] = {
    ".parquet": _to_parquet,
    ".csv": _to_csv,
    ".json": _to_json,
    ".md": _to_markdown,
    ".tex": _to_latex,
}


READERS: Mapping[str, Callable[[Path], Read]] = {
    ".parquet": _from_parquet,
    ".csv": _from_csv,
    ".json": _from_json,
}
