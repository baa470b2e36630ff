"""The store over safetensors files, one or shards: every header is checked before a tensor is read."""

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from affectlens.checkpoints.bytes import DOWNLOAD_AGAIN, FIRST, Bytes, LocalFile, Span, refuse_impostors
from affectlens.checkpoints.documents import Doubled, counting, elsewhere, parse
from affectlens.checkpoints.store import Header
from affectlens.errors import CheckpointError, quoted

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
HASHED = 64_000_000  # bytes; to hash more would cost as much as the diff
_LIMIT = 100_000_000  # bytes of a header; the limit of the format
MOST = 200_000  # tensors; no model has as many, and a diff of them takes a minute
_DIMENSIONS = 64  # torch's limit
_ELEMENTS = 2**63  # torch's limit
DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8),
    "U64": ("uint64", 64), "U32": ("uint32", 32), "U16": ("uint16", 16), "U8": ("uint8", 8),
    "BOOL": ("bool", 8), "C64": ("complex64", 64),
}  # fmt: skip
_IMPOSTORS = (
    (rb"PK\x03\x04.{26}[^/]{1,80}\.npy", "this is a NumPy .npz archive", "Use the PyTorch checkpoint"),
    (rb"PK\x03\x04", "this is a zip archive, probably a torch .pth", "Rename it to .pth"),
    (rb"\x80[\x02-\x05]", "this is a pickle", "Convert it to safetensors"),
    (rb"[\t\n\r -~]{8}", "this is text, probably an error message", DOWNLOAD_AGAIN),
)
_PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # bits; torch has no dtypes below one byte


class SafetensorsStore:
    """Read tensors from safetensors files, on disk or on a hub; opening reads their headers only.

    `weights` is the index, the file of each tensor: it decides if two files hold the same tensor.
    """

    format = "safetensors"

    def __init__(
        self,
        source: str,
        files: Sequence[Bytes],
        *,
        config: Mapping[str, Any],
        revision: str = "",
        weights: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.config, self.revision = source, config, revision
        self.name = Path(source).name if Path(source).exists() else source
        self.files = sorted(files, key=lambda file: file.name)
        self.aliases: Mapping[str, str] = {}
        found = {_name(file): read_header(file) for file in self.files}
        where, self.skipped = _sorted_out(found, weights or {}, source)
        self.headers: Mapping[str, Header] = {name: found[file].tensors[name] for name, file in where.items()}
        self._spans = {name: found[file].spans[name] for name, file in where.items()}
        self._digests = [header.digest for header in found.values()]
        self.notes: tuple[str, ...] = elsewhere(weights or {}, where)
        if len(where) > MOST:
            raise CheckpointError(source, f"holds more than {MOST:,} tensors")
        if not where:
            reason = "holds no tensor that can be read" if self.skipped else "holds no tensor"
            raise CheckpointError(self.files[0].name if len(self.files) == 1 else source, reason)

    def by_rows(self, tensor: str) -> bool:
        """Return whether a tensor has rows; each can be read alone."""
        return bool(self.headers[tensor].shape)

    def span(self, tensor: str) -> Span:
        """Return where the bytes of a tensor are."""
        return self._spans[tensor]

    def origin(self, tensor: str) -> Span:
        """Return the span: this store has no edits."""
        return self.span(tensor)

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor as stored, or some of its rows."""
        from affectlens.checkpoints.slicing import tensor_of

        return tensor_of(self._spans[tensor], self.headers[tensor], rows=rows)

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        for file in self.files:
            file.check()

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes, bytes and number of files.

        The header hash covers names, shapes, dtypes and offsets, so base and tuned often share it.
        Small checkpoints on this machine also get a hash of their content.
        """
        size = sum(file.size for file in self.files)
        found = {
            "header_sha256": _sha256(digest.encode() for digest in self._digests),
            "bytes": size,
            "files": len(self.files),
        }
        if self.revision:
            found["revision"] = self.revision
        if size <= HASHED and all(isinstance(file, LocalFile) for file in self.files):
            found["content_sha256"] = _sha256(Span(file, 0, file.size).read() for file in self.files)
            self.check()
        return found


class FileHeader(NamedTuple):
    """The tensors of one file, where each is stored, those that can't be read, and the hash of the header."""

    tensors: dict[str, Header]
    spans: dict[str, Span]
    skipped: dict[str, tuple[str, int]]
    digest: str


def read_header(file: Bytes) -> FileHeader:
    """Parse and check the header of a safetensors file; nothing beyond it is read.

    Raises `CheckpointError`, naming file and tensor, for a file of another format or cut short, for a tensor
    named twice, and for tensors that overlap, leave holes or do not fit their shapes.
    """
    path, size = file.name, file.size
    raw = _raw(file)
    entries = _entries(path, raw)
    if len(entries) > MOST:
        raise CheckpointError(path, f"the header names more than {MOST:,} tensors")
    found = {name: _entry(path, name, entry) for name, entry in entries.items()}
    _check_cover(path, found, size - 8 - len(raw))
    data = Span(file, 8 + len(raw), size)
    return FileHeader(
        {name: entry.header for name, entry in found.items() if not entry.packed},
        {name: data.part(entry.start, entry.stop) for name, entry in found.items() if not entry.packed},
        {name: _unread(entry.header) for name, entry in found.items() if entry.packed},
        hashlib.sha256(raw).hexdigest(),
    )


class Entry(NamedTuple):
    """The entry of a tensor in a header: its shape and dtype, and the range of its bytes."""

    header: Header
    start: int
    stop: int

    @property
    def packed(self) -> bool:
        """Whether its dtype can't be read."""
        return self.header.dtype in _PACKED


def _sha256(parts: Iterable[bytes | bytearray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _name(file: Bytes) -> str:
    name = Path(file.name).name
    return unquote(name) if file.remote else name


def _sorted_out(
    found: Mapping[str, FileHeader], weights: Mapping[str, str], source: str
) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """Return the file to read each tensor from, and the tensors to skip: why, and their elements."""
    shapes = {file: {name: h.shape for name, h in header.tensors.items()} for file, header in found.items()}
    where, copies = counting(shapes, weights, source=source)
    skipped = {name: why for header in found.values() for name, why in header.skipped.items()}
    return where, skipped | copies


def _raw(file: Bytes) -> bytes:
    """Return the bytes of the header; raises `CheckpointError` if there is none."""
    path, size = file.name, file.size
    first = bytes(Span(file, 0, min(FIRST, size)).read())
    length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    # The first bytes of a valid length can equal the mark of another format: 640 is that of pickles.
    if length > size - 8 or first[8:9] != b"{":
        refuse_impostors(path, first, others=_IMPOSTORS)
    if len(first) < 8:
        reason = f"only {size} bytes long, too short for a header" if size else "this file is empty"
        raise CheckpointError(path, reason, fix=DOWNLOAD_AGAIN)
    if length > size - 8:
        reason = f"the header claims {length:,} bytes, the file has {size:,}"
        raise CheckpointError(path, reason, fix="Is the file complete, and is it safetensors?")
    if length > _LIMIT:
        raise CheckpointError(path, f"the header has {length:,} bytes, the format allows {_LIMIT:,}")
    raw = bytes(Span(file, 8, 8 + length).read())
    if not raw.startswith(b"{"):
        raise CheckpointError(path, "the header is not a JSON object")
    return raw


def _entries(path: str, raw: bytes) -> dict[str, Any]:
    entries = parse(raw, path, what="the header ").content
    if isinstance(entries, Doubled):
        raise CheckpointError(path, "named twice in the header", key=entries.twice)
    about = entries.pop("__metadata__", None) or {}
    if isinstance(about, Doubled):
        raise CheckpointError(path, f"the header's __metadata__ has the key {quoted(about.twice)} twice")
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise CheckpointError(path, "the header's __metadata__ must map strings to strings")
    return entries


def _entry(path: str, name: str, entry: Any) -> Entry:
    try:
        name.encode()  # half a surrogate pair is not text, and printing it fails
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except UnicodeEncodeError:
        raise CheckpointError(path, "its name is not valid Unicode", key=name) from None
    except (KeyError, TypeError, ValueError):
        reason = "its header entry lacks dtype, shape or data_offsets"
        raise CheckpointError(path, reason, key=name) from None
    if isinstance(entry, Doubled):
        raise CheckpointError(path, f"its header entry has the key {quoted(entry.twice)} twice", key=name)
    if not isinstance(kind, str) or kind not in (*DTYPES, *_PACKED):
        raise CheckpointError(path, f"unknown dtype {quoted(kind)}", key=name)
    integers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(value) is int and 0 <= value < 2**63 for value in integers):
        raise CheckpointError(path, "shape and offsets must be whole numbers ≥ 0", key=name)
    # Dimensions are counted before they are multiplied: a million of them would take minutes. Zeros are left
    # out, since torch multiplies in order and can overflow before it reaches a zero.
    if len(shape) > _DIMENSIONS or math.prod(filter(None, shape)) >= _ELEMENTS:
        raise CheckpointError(path, "more dimensions or elements than a tensor can have", key=name)
    dtype, bits = DTYPES.get(kind) or (kind, _PACKED[kind])
    if 8 * (stop - start) != math.prod(shape) * bits:
        reason = f"{stop - start} bytes for shape {tuple(shape)} of {dtype}"
        raise CheckpointError(path, reason, key=name)
    return Entry(Header(tuple(shape), dtype), start, stop)


def _unread(header: Header) -> tuple[str, int]:
    reason = f"its dtype {header.dtype} has less than a byte per element, which is not supported"
    return reason, math.prod(header.shape)


def _check_cover(path: str, entries: dict[str, Entry], size: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][1:3]):
        if entry.start != end:
            kind = "overlaps another tensor" if entry.start < end else "leaves a hole before it"
            raise CheckpointError(path, kind, key=name)
        end = entry.stop
    if end != size:
        reason = f"the tensors need {end:,} bytes of data, the file holds {size:,}"
        raise CheckpointError(path, reason, fix=DOWNLOAD_AGAIN)
