"""Read a safetensors header strictly: two readers of one file must never see different tensors."""

import hashlib
import json
import math
import struct
from typing import Any, NamedTuple

from affectlens.checkpoints.bytes import Bytes, Span
from affectlens.checkpoints.checkpoint import Header
from affectlens.checkpoints.impostors import refuse_impostors
from affectlens.errors import CheckpointError

_LIMIT = 100_000_000  # bytes, the format's own
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "C64": ("complex64", 8),
}  # fmt: skip

_IMPOSTORS = (
    (rb"PK\x03\x04", "this is a zip archive, probably a torch .pth", "Rename it to .pth"),
    (rb"\x80\x02", "this is a pickle", "Convert it to safetensors"),
)


class FileHeader(NamedTuple):
    """The tensors of one file and where they lie in it, and the hash of its header."""

    tensors: dict[str, Header]
    spans: dict[str, Span]
    digest: str


def read_header(file: Bytes) -> FileHeader:
    """Parse and check the header of a safetensors file; nothing beyond it is read.

    Raises `CheckpointError`, naming file and tensor, for what is no safetensors file, is cut short,
    names a tensor twice, or whose tensors overlap, leave holes or do not fit their shapes.
    """
    path, size = file.name, file.size
    first = Span(file, 0, min(32, size)).read()
    refuse_impostors(path, bytes(first), others=_IMPOSTORS)
    if len(first) < 8:
        raise CheckpointError(path, f"only {size} bytes long, too short for a header")
    (length,) = struct.unpack("<Q", first[:8])
    if length > min(_LIMIT, size - 8):
        reason = f"the header claims {length:,} bytes, the file has {size:,}"
        raise CheckpointError(path, reason, fix="Is the file complete, and is it safetensors?")
    raw = bytes(Span(file, 8, 8 + length).read())
    entries = _entries(path, raw)
    entries.pop("__metadata__", None)
    found = [_entry(path, name, entry) for name, entry in entries.items()]
    _check_cover(path, found, size - 8 - length)
    tensors = {name: header for name, header, _, _ in found}
    data = Span(file, 8 + length, size)
    spans = {name: data.part(start, stop) for name, _, start, stop in found}
    return FileHeader(tensors, spans, hashlib.sha256(raw).hexdigest())


def _entries(path: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(path, "named twice in the header", key=twice)
        return entries

    try:
        entries = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, "the header is not valid JSON") from None
    if not isinstance(entries, dict):
        raise CheckpointError(path, "the header is not a JSON object")
    return entries


def _entry(path: str, name: str, entry: Any) -> tuple[str, Header, int, int]:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        reason = "its header entry lacks dtype, shape or data_offsets"
        raise CheckpointError(path, reason, key=name) from None
    if kind not in _DTYPES:
        raise CheckpointError(path, f"unknown dtype {kind!r}", key=name)
    integers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(value) is int and 0 <= value < 2**63 for value in integers):
        raise CheckpointError(path, "shape and offsets must be whole numbers ≥ 0", key=name)
    dtype, width = _DTYPES[kind]
    if stop - start != math.prod(shape) * width:
        reason = f"{stop - start} bytes for shape {tuple(shape)} of {dtype}"
        raise CheckpointError(path, reason, key=name)
    return name, Header(tuple(shape), dtype), start, stop


def _check_cover(path: str, spans: list[tuple[str, Header, int, int]], size: int) -> None:
    end = 0
    for name, _, start, stop in sorted(spans, key=lambda span: span[2:]):
        if start != end:
            kind = "overlaps another tensor" if start < end else "leaves a hole before it"
            raise CheckpointError(path, kind, key=name)
        end = stop
    if end != size:
        reason = f"the tensors need {end:,} bytes of data, the file holds {size:,}"
        raise CheckpointError(path, reason, fix="Download it again")
