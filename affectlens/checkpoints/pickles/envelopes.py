"""Find the weights in a torch file, which may be nested in mappings such as "state_dict".

open_torch_file ──▶ mappings ── unwrap ──▶ tensors by name, and a count of what else was saved
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from affectlens.checkpoints.pickles.rebuilding import CONSOLIDATE, Settings, Stored
from affectlens.errors import CheckpointError
from affectlens.printable import plain

_ENVELOPES = ("state_dict", "model", "module", "model_state_dict", "net", "params")
_DEEPEST = 8  # envelopes; a mapping may contain itself


class Contents(NamedTuple):
    """The tensors of the model, and what else a file holds."""

    tensors: dict[str, Stored]
    skipped: dict[str, tuple[str, int]]  # tensors whose bytes are not their values: why, and elements
    ignored: dict[str, tuple[int, int]]  # key path → number of tensors, number of elements


def unwrap(loaded: object, path: str) -> Contents:
    """Find the tensors of the model in a saved object, and count the rest.

    Raises `CheckpointError` if there are none, saying what there is instead.
    """
    ignored: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()
    above = ""
    for _ in range(_DEEPEST):
        inner = _envelope(loaded)
        if inner is None:
            break
        assert isinstance(loaded, dict)
        ignored |= {_path(above, key): _count(value, seen) for key, value in loaded.items() if key != inner}
        above, loaded = _path(above, inner), loaded[inner]
    if not isinstance(loaded, dict):
        kind = "tensor" if isinstance(loaded, Stored) else type(loaded).__name__
        raise CheckpointError(path, f"holds a {kind}, not named tensors")
    named = {
        key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Stored)
    }
    ignored |= {_path(above, key): _count(value, seen) for key, value in loaded.items() if key not in named}
    skipped = {key: (value.kind, value.size) for key, value in named.items() if value.kind}
    tensors = {key: value for key, value in named.items() if key not in skipped}
    if not tensors:
        raise _without_model(path, loaded, skipped)
    if 2 * sum(not tensor.size for tensor in tensors.values()) > len(tensors):
        reason = "most of its tensors are empty, as in a shard of DeepSpeed ZeRO-3"
        raise CheckpointError(path, reason, fix=CONSOLIDATE)
    return Contents(tensors, skipped, ignored)


def _envelope(loaded: object) -> str | None:
    """Return the key whose value holds the model; None if the model is not nested, or not there."""
    if not isinstance(loaded, dict):
        return None
    here = sum(value.size for key, value in loaded.items() if isinstance(key, str) and _usable(value))
    for key in _ENVELOPES:
        # A few tensors beside it, such as a step counter, are fine; if they outweigh it, it is not the model.
        if _holds_model(loaded.get(key)) and _count(loaded[key], set())[1] >= here:
            return key
    return None


def _holds_model(value: object) -> bool:
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if not isinstance(item, dict) or id(item) in seen:
            continue
        seen.add(id(item))
        if any(isinstance(key, str) and _usable(inner) for key, inner in item.items()):
            return True
        todo += (item.get(key) for key in _ENVELOPES)
    return False


def _count(value: object, seen: set[int]) -> tuple[int, int]:
    """Count the tensors and elements in a value; those in `seen` are not counted again."""
    todo, tensors, elements = [value], 0, 0
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Stored):
            tensors, elements = tensors + 1, elements + item.size
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif isinstance(item, Settings):
            todo.append(item.attributes)
    return tensors, elements


def _usable(value: object) -> bool:
    return isinstance(value, Stored) and not value.kind


def _path(above: str, key: object) -> str:
    return f"{above}.{key}" if above else str(key)


def _without_model(
    path: str, loaded: Mapping[Any, object], skipped: Mapping[str, tuple[str, int]]
) -> CheckpointError:
    if skipped:
        first, (kind, _) = next(iter(skipped.items()))
        return CheckpointError(path, f"all {len(skipped)} tensors are {kind} or similar", key=first)
    keys = [str(key) for key in loaded]
    if "ds_version" in keys or "optimizer_state_dict" in keys:
        reason = "holds no model weights: optimizer state only, as in a shard of DeepSpeed ZeRO"
        return CheckpointError(path, reason, fix=CONSOLIDATE)
    if "param_groups" in keys or any("optim" in key for key in keys):
        reason, fix = "holds no model weights: optimizer state only", "Name the file of the weights"
        return CheckpointError(path, reason, fix=fix)
    there = plain(", ".join(keys[:6]) + (", …" if len(keys) > 6 else "")) or "nothing"
    return CheckpointError(path, "holds no model weights", fix=f"In it: {there}")
