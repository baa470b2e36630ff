"""JSON as every reader of it must understand it: headers, indexes and configs come from strangers."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from affectlens.errors import CheckpointError, quoted
from affectlens.files import opened

JSON_LIMIT = 64_000_000  # bytes; a config or index beyond this is no config or index
_VALUES = 2_000_000  # each takes up to a hundred bytes when it is parsed, and some microseconds
_DEEPEST = 64  # a config has five levels
_NAME = re.compile(r"[^/\\:]+", re.DOTALL)


class Doubled(dict[str, Any]):
    """An object that has a key twice: most readers take the last, some the first."""

    twice = ""  # that key


class Document(NamedTuple):
    """A JSON object, and the keys that stand twice in one of its objects, however deep."""

    content: dict[str, Any]
    twice: tuple[str, ...] = ()

    def strict(self, path: str | Path) -> dict[str, Any]:
        """The object; raises `CheckpointError` where a key stands twice."""
        for key in self.twice:
            raise CheckpointError(path, f"has the key {quoted(key)} twice")
        return self.content

    def notes(self, name: str) -> tuple[str, ...]:
        """A remark where a key stands twice."""
        first = f"{name} has the key {quoted(self.twice[0])} twice; the last counts." if self.twice else ""
        return (first,) if first else ()


def parse(raw: bytes, path: str | Path, *, what: str = "") -> Document:
    """Parse a JSON object, which is `what` of the file.

    Raises `CheckpointError` for what is no UTF-8, no JSON or no object.
    """
    if raw.count(b",") > _VALUES:
        raise CheckpointError(path, f"{what}has more than {_VALUES:,} values")
    twice: list[str] = []

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        doubled, counts = Doubled(found), Counter(key for key, _ in pairs)
        doubled.twice = next(key for key, count in counts.items() if count > 1)
        twice.append(doubled.twice)
        return doubled

    try:
        # Given bytes, Python would take UTF-16 as well, which no other reader of these files does.
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=entries)
    except UnicodeDecodeError:
        raise CheckpointError(path, f"{what}is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            path, f"{what}is not valid JSON ({error.msg} at character {error.pos:,})"
        ) from None
    except (ValueError, RecursionError):  # a number of too many digits, brackets too deep
        raise CheckpointError(path, f"{what}is not valid JSON that can be read") from None
    if not isinstance(content, dict):
        raise CheckpointError(path, f"{what}is not a JSON object")
    if _deeper(content, _DEEPEST):
        raise CheckpointError(path, f"{what}is nested more than {_DEEPEST} deep")
    return Document(content, tuple(twice))


def _deeper(content: Any, most: int) -> bool:
    """Whether something is nested deeper: to compare it, Python would need more of its stack than it has."""
    level = [content]
    for _ in range(most):
        items = (item.values() if isinstance(item, dict) else item for item in level)
        level = [inner for inside in items for inner in inside if isinstance(inner, dict | list)]
    return bool(level)


def read_json(path: Path) -> Document:
    """Read a file with a JSON object. Raises `CheckpointError`."""
    with os.fdopen(opened(path), "rb") as stream:
        raw = stream.read(JSON_LIMIT + 1)  # it may be longer than it says, or grow
    if len(raw) > JSON_LIMIT:
        raise CheckpointError(path, f"larger than {JSON_LIMIT:,} bytes")
    return parse(raw, path)


def weight_map(index: Document, path: str, *, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The file of each tensor. Raises `CheckpointError` for an index that can't be followed.

    `suffixes` are those of the files that it may name: one kind of file is read by one kind of reader.
    """
    weights = index.content.get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise CheckpointError(path, "the index has no weight_map from tensors to files")
    if isinstance(weights, Doubled):
        raise CheckpointError(path, "the index places it twice", key=weights.twice)
    index.strict(path)
    if not weights:
        raise CheckpointError(path, "the index places no tensor in any file")
    for file, tensor in {file: tensor for tensor, file in weights.items()}.items():
        if not plain_name(file):
            raise CheckpointError(path, f"names a file outside the folder: {quoted(file)}", key=tensor)
        if not file.endswith(suffixes):
            reason = f"the index places it in {quoted(file)}, which is no {' or '.join(suffixes)} file"
            raise CheckpointError(path, reason, key=tensor)
    return weights


def plain_name(file: str) -> bool:
    """Whether this names a file in a folder, and on no system a path out of it."""
    return file not in (".", "..") and _NAME.fullmatch(file) is not None


def elsewhere(weights: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """Remarks on tensors that lie in other files than the index says, or that it does not know."""
    remarks = []
    moved = sorted(tensor for tensor, file in found.items() if weights.get(tensor, file) != file)
    if moved:
        first = f"{quoted(moved[0])} is in {quoted(found[moved[0]])}, not in {quoted(weights[moved[0]])}"
        remarks.append(f"{len(moved)} tensors lie in other files than the index says (first: {first}).")
    unknown = sorted(found.keys() - weights.keys()) if weights else []
    if unknown:
        first = f"{quoted(unknown[0])} in {quoted(found[unknown[0]])}"
        remarks.append(f"{len(unknown)} tensors are stored that the index does not list (first: {first}).")
    return tuple(remarks)


def counting(
    found: Mapping[str, Mapping[str, tuple[int, ...]]], weights: Mapping[str, str], *, source: str
) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """The file that counts of each tensor, given those of each file; and of second copies why, and elements.

    Raises `CheckpointError` for a tensor in two files where no index says which is meant.
    """
    where: dict[str, str] = {}
    copies: dict[str, list[str]] = {}
    for file, shapes in found.items():
        for tensor in shapes:
            if where.setdefault(tensor, file) != file:
                copies.setdefault(tensor, [where[tensor]]).append(file)
    skipped: dict[str, tuple[str, int]] = {}
    for tensor, files in sorted(copies.items()):
        named = weights.get(tensor)
        if named not in files:
            reason = f"stored in {' and '.join(map(quoted, files[:2]))}, and no index says which counts"
            raise CheckpointError(source, reason, key=tensor)
        where[tensor] = named
        why = "a second copy, in a file where the index does not place it"
        others = [file for file in files if file != named]
        skipped |= {f"{tensor} in {file}": (why, math.prod(found[file][tensor])) for file in others}
    return where, skipped
