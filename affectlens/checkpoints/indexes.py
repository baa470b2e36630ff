"""The index of a sharded checkpoint: which file holds which tensor, as far as a stranger can be believed."""

import math
import re
from collections.abc import Mapping

from affectlens.checkpoints.parsing import Document, Doubled
from affectlens.errors import CheckpointError, quoted

_NAME = re.compile(r"[^/\\:]+", re.DOTALL)


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
