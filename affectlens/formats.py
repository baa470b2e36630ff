"""The forms a table is written in, and read back from; each takes a frame and the head that goes with it.

The head (schema and origin, as JSON) lies inside Parquet and JSON, and in the first line of a CSV.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from affectlens import html

Read = tuple[pd.DataFrame, str, dict[str, Any]]  # frame, schema, origin

_TEXT = ("name", "parameter", "label", "null_of")  # words, though they may be all digits
_EMPTY = ["label", "null_of"]  # columns in which "" is a value
_FORMULA = re.compile(r"^[=+\-@\t\r]")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as strict JSON values: every digit kept, NaN and null as null."""
    kept = frame.astype(object).where(frame.notna(), None)
    return [{str(k): _plain(v) for k, v in row.items()} for row in kept.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame without its columns of arrays, for forms that have a number or a word a cell."""
    return frame[[name for name in frame if not holds_arrays(frame[name])]]


def holds_arrays(column: pd.Series) -> bool:
    """Whether cells of a column are arrays."""
    return column.dtype == object and any(isinstance(cell, np.ndarray) for cell in column)


def _to_parquet(frame: pd.DataFrame, head: str, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.Table.from_pandas(frame, preserve_index=False)
    metadata = {**(rows.schema.metadata or {}), b"affectlens": head.encode()}
    pq.write_table(rows.replace_schema_metadata(metadata), path)


def _from_parquet(path: Path) -> Read:
    import pyarrow.parquet as pq

    rows = pq.read_table(path)
    head = json.loads((rows.schema.metadata or {})[b"affectlens"])
    return rows.to_pandas(), head["schema"], head["origin"]


def _to_csv(frame: pd.DataFrame, head: str, path: Path) -> None:
    # A spreadsheet runs a cell that begins with one of these as a formula.
    safe = flat(frame).map(lambda x: f"'{x}" if isinstance(x, str) and _FORMULA.match(x) else x)
    with path.open("w", encoding="utf-8") as stream:
        stream.write(f"# {head}\n")
        safe.to_csv(stream, index=False)


def _from_csv(path: Path) -> Read:
    with path.open(encoding="utf-8") as stream:
        head = json.loads(stream.readline().removeprefix("# "))
        # Null is written as nothing, so that a checkpoint may be called "nan".
        text = dict.fromkeys(_TEXT, str)
        frame = pd.read_csv(stream, dtype=text, keep_default_na=False, na_values=[""])
    for name in frame.columns.intersection(_EMPTY):
        frame[name] = frame[name].fillna("").astype(str)  # a CSV can't tell "" from null
    return _typed(frame), head["schema"], head["origin"]


def _to_json(frame: pd.DataFrame, head: str, path: Path) -> None:
    rows = json.dumps(records(frame), allow_nan=False)
    path.write_text(head[:-1] + f', "rows": {rows}}}', "utf-8")


def _from_json(path: Path) -> Read:
    head = json.loads(path.read_text("utf-8"))
    frame = pd.DataFrame(head["rows"])
    for name in frame.columns[[any(isinstance(cell, list) for cell in frame[name]) for name in frame]]:
        arrays = [np.asarray(cell, float) if isinstance(cell, list) else None for cell in frame[name]]
        frame[name] = pd.Series(arrays, index=frame.index, dtype=object)
    return _typed(frame), head["schema"], head["origin"]


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = frame.columns.intersection(["layer", "expert", "seed"])
    return frame.astype(dict.fromkeys(numbers, "Int64"))


def _to_markdown(frame: pd.DataFrame, head: str, path: Path) -> None:
    def row(cells: Collection[Any]) -> str:
        return "| " + " | ".join(html.number(cell).replace("|", "\\|") for cell in cells) + " |"

    frame = flat(frame)
    names = list(frame.columns)
    body = [row(cells) for cells in frame.itertuples(index=False)]
    path.write_text("\n".join([row(names), "|" + " --- |" * len(names), *body, ""]), "utf-8")


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _to_latex(frame: pd.DataFrame, head: str, path: Path) -> None:
    def row(cells: Collection[Any]) -> str:
        return " & ".join(html.number(cell).translate(escapes) for cell in cells) + r" \\"

    escapes = str.maketrans(_LATEX)
    frame = flat(frame)
    names = list(frame.columns)
    body = [row(cells) for cells in frame.itertuples(index=False)]
    lines = [rf"\begin{{tabular}}{{{'l' * len(names)}}}", r"\toprule", row(names), r"\midrule"]
    path.write_text("\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}", ""]), "utf-8")


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
