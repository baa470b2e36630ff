"""Strict JSON for headers, indexes and configs, which may come from strangers; and the index of shards."""

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

JSON_LIMIT = 64_000_000  # bytes; no real config or index is as large
_VALUES = 2_000_000  # a parsed value takes up to a hundred bytes and some microseconds
_DEEPEST = 64  # levels; a real config has about five
_NAME = re.compile(r"[^/\\:]+", re.DOTALL)


class Doubled(dict[str, Any]):
    """A JSON object that has a key twice: most readers take the last value, some the first."""

    twice = ""  # the first such key


class Document(NamedTuple):
    """A JSON object, and every key that occurs twice in an object at any depth."""

    content: dict[str, Any]
    twice: tuple[str, ...] = ()

    def strict(self, path: str | Path) -> dict[str, Any]:
        """Return the object; raises `CheckpointError` if a key occurs twice."""
        for key in self.twice:
            raise CheckpointError(path, f"has the key {quoted(key)} twice")
        return self.content

    def notes(self, name: str) -> tuple[str, ...]:
        """Return a remark on the first key that occurs twice, if there is one."""
        first = (
            f"{name} has the key {quoted(self.twice[0])} twice; the last one counts." if self.twice else ""
        )
        return (first,) if first else ()


def parse(raw: bytes, path: str | Path, *, what: str = "") -> Document:
    """Parse a JSON object; in errors `what` says which part of the file it is.

    Raises `CheckpointError` for bytes that are not UTF-8, not JSON, or not an object.
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
        # json.loads(bytes) also accepts UTF-16, which no other reader of these files does.
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=entries)
    except UnicodeDecodeError:
        raise CheckpointError(path, f"{what}is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            path, f"{what}is not valid JSON ({error.msg} at character {error.pos:,})"
        ) from None
    except (ValueError, RecursionError):
        reason = f"{what}is not valid JSON (a number is too long, or brackets are nested too deep)"
        raise CheckpointError(path, reason) from None
    if not isinstance(content, dict):
        raise CheckpointError(path, f"{what}is not a JSON object")
    if _deeper(content, _DEEPEST):
        raise CheckpointError(path, f"{what}is nested more than {_DEEPEST} levels deep")
    return Document(content, tuple(twice))


def read_json(path: Path) -> Document:
    """Read the JSON object in a file; raises `CheckpointError`."""
    with os.fdopen(opened(path), "rb") as stream:
        raw = stream.read(JSON_LIMIT + 1)  # its stated size may be wrong, or grow
    if len(raw) > JSON_LIMIT:
        raise CheckpointError(path, f"larger than {JSON_LIMIT:,} bytes")
    return parse(raw, path)


def weight_map(index: Document, path: str, *, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return the file of each tensor; raises `CheckpointError` for an index that can't be followed.

    Every file must end in one of `suffixes`, since one reader reads one kind of file.
    """
    weights = index.content.get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise CheckpointError(path, "the index has no weight_map from tensors to files")
    if isinstance(weights, Doubled):
        raise CheckpointError(path, "the index lists it twice", key=weights.twice)
    index.strict(path)
    if not weights:
        raise CheckpointError(path, "the index lists no tensor")
    # Once a file: an index has few files, and up to 200,000 tensors.
    for file, tensor in {file: tensor for tensor, file in weights.items()}.items():
        if not plain_name(file):
            raise CheckpointError(path, f"names a file outside the folder: {quoted(file)}", key=tensor)
        if not file.endswith(suffixes):
            reason = f"the index places it in {quoted(file)}, which is not a {' or '.join(suffixes)} file"
            raise CheckpointError(path, reason, key=tensor)
    return weights


def plain_name(file: str) -> bool:
    """Return whether a name stays inside its folder on every operating system."""
    return file not in (".", "..") and _NAME.fullmatch(file) is not None


def elsewhere(weights: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """Return remarks on tensors in other files than the index says, and on tensors that it does not list."""
    remarks = []
    moved = sorted(tensor for tensor, file in found.items() if weights.get(tensor, file) != file)
    if moved:
        first = f"{quoted(moved[0])} is in {quoted(found[moved[0]])}, not in {quoted(weights[moved[0]])}"
        remarks.append(f"{len(moved)} tensors are in other files than the index says (first: {first}).")
    unknown = sorted(found.keys() - weights.keys()) if weights else []
    if unknown:
        first = f"{quoted(unknown[0])} in {quoted(found[unknown[0]])}"
        remarks.append(f"{len(unknown)} stored tensors are not in the index (first: {first}).")
    return tuple(remarks)


def counting(
    found: Mapping[str, Mapping[str, tuple[int, ...]]], weights: Mapping[str, str], *, source: str
) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """Return the file to read each tensor from, and the copies to skip: why, and their elements.

    `found` has the tensors of each file with their shapes. Raises `CheckpointError` for a tensor in two
    files if no index says which to read.
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
            reason = f"stored in {' and '.join(map(quoted, files[:2]))}, and no index says which to read"
            raise CheckpointError(source, reason, key=tensor)
        where[tensor] = named
        why = "a second copy, in another file than the index says"
        others = [file for file in files if file != named]
        skipped |= {f"{tensor} in {file}": (why, math.prod(found[file][tensor])) for file in others}
    return where, skipped


def _deeper(content: Any, most: int) -> bool:
    """Return whether a value is nested deeper than `most` levels: comparing it could overflow the stack."""
    # Level by level, since recursion would overflow the stack itself.
    level = [content]
    for _ in range(most):
        items = (item.values() if isinstance(item, dict) else item for item in level)
        level = [inner for inside in items for inner in inside if isinstance(inner, dict | list)]
    return bool(level)
