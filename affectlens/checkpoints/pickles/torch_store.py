"""The store over torch's own files `.bin`, `.pth` and `.pt`, whole or in shards.

    file ── archives.open_torch_file ──▶ saved object ── envelopes.unwrap ──▶ tensors ──▶ their places

A pickle is a program, so it is never run: it is read as data, and any name but those of torch's tensors and
plain containers is refused. Opening finds the place of each tensor in the file, and its bytes are read from
there, as with safetensors.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from affectlens.checkpoints.bytes import LocalFile, Span
from affectlens.checkpoints.documents import counting, elsewhere
from affectlens.checkpoints.pickles.archives import open_torch_file
from affectlens.checkpoints.pickles.envelopes import Contents, unwrap
from affectlens.checkpoints.pickles.rebuilding import WIDTHS, Stored
from affectlens.checkpoints.safetensors import HASHED
from affectlens.checkpoints.store import Header
from affectlens.errors import CheckpointError, quoted
from affectlens.printable import plain

if TYPE_CHECKING:
    from torch import Tensor

_STRIP = 4096  # bytes; it is faster to fetch the gaps as well than many shorter strips
_FAR = 64_000_000  # bytes; larger gaps are never fetched
_NOTES = 8  # listed one by one


class Placed(NamedTuple):
    """The place of a tensor's elements: a storage, an offset and strides."""

    storage: Span
    offset: int  # in elements, as the strides are
    header: Header
    strides: tuple[int, ...]
    contiguous: bool

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return WIDTHS[self.header.dtype]

    @property
    def extent(self) -> int:
        """Elements from the first to the last, including those between them."""
        shape = self.header.shape
        steps = sum((length - 1) * stride for length, stride in zip(shape, self.strides, strict=True))
        return 0 if 0 in shape else steps + 1

    def part(self, start: int, count: int) -> Span:
        """Return the bytes of some elements of the storage."""
        width = self.width
        return self.storage.part(start * width, (start + count) * width) if count else self.storage.part(0, 0)


class PickleStore:
    """Read tensors from torch's files; opening reads names, shapes and places only.

    `aliases` (also `tied`) maps a name that shares its bytes to the name that is kept; `headers` has only the
    latter. `ignored` counts what was saved beside the model: key path → (tensors, elements).
    """

    format = "pickle"

    def __init__(
        self,
        source: str,
        files: Sequence[LocalFile],
        *,
        config: Mapping[str, Any],
        revision: str = "",
        weights: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.config, self.revision = source, config, revision
        self.name = Path(source).name if Path(source).exists() else source
        self.files = sorted(files, key=lambda file: file.name)
        self.ignored: dict[str, tuple[int, int]] = {}
        self.aliases: dict[str, str] = {}
        self._placed: dict[str, Placed] = {}
        found: dict[str, dict[str, Placed]] = {}
        skipped: dict[str, tuple[str, int]] = {}
        for file in self.files:
            contents, found[file.path.name] = _opened(file)
            skipped |= contents.skipped
            for path, (tensors, elements) in contents.ignored.items():
                known = self.ignored.get(path, (0, 0))
                self.ignored[path] = known[0] + tensors, known[1] + elements
        shapes = {
            file: {name: at.header.shape for name, at in placed.items()} for file, placed in found.items()
        }
        counts, copies = counting(shapes, weights or {}, source=source)
        self.skipped = skipped | copies
        for name, placed in found.items():
            here = {tensor: at for tensor, at in placed.items() if counts[tensor] == name}
            # Only within a file: two files never share bytes.
            self.aliases |= (tied := _tied(here))
            self._placed |= {tensor: at for tensor, at in here.items() if tensor not in tied}
        self.headers: Mapping[str, Header] = {tensor: where.header for tensor, where in self._placed.items()}
        self.tied: Mapping[str, str] = self.aliases
        self.notes: tuple[str, ...] = (*elsewhere(weights or {}, counts), *_left_out(self.ignored))

    def by_rows(self, tensor: str) -> bool:
        """Return whether a tensor has rows; each can be read alone."""
        return bool(self.headers[tensor].shape)

    def span(self, tensor: str) -> Span | None:
        """Return where the bytes of a tensor are; None if they are not one run."""
        where = self._placed[tensor]
        return where.part(where.offset, where.extent) if where.contiguous else None

    def origin(self, tensor: str) -> Span | None:
        """Return the span: this store has no edits."""
        return self.span(tensor)

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor as stored, or some of its rows."""
        from affectlens.checkpoints.slicing import tensor_of

        where = self._placed[tensor]
        if where.contiguous:
            return tensor_of(where.part(where.offset, where.extent), where.header, rows=rows)
        if rows is not None:
            first, last, _ = rows.indices(where.header.shape[0])
            shape = (max(last - first, 0), *where.header.shape[1:])
            header = where.header._replace(shape=shape)
            where = where._replace(offset=where.offset + first * where.strides[0], header=header)
        return _gathered(where)

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        for file in self.files:
            file.check()

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes, bytes and number of files; the header hash covers names, shapes and dtypes."""
        size = sum(file.size for file in self.files)
        headers = json.dumps(sorted(self.headers.items())).encode()
        hashed = hashlib.sha256(headers).hexdigest()
        found: dict[str, Any] = {"header_sha256": hashed, "bytes": size, "files": len(self.files)}
        if self.revision:
            found["revision"] = self.revision
        if size <= HASHED:
            content = hashlib.sha256()
            for file in self.files:
                content.update(Span(file, 0, file.size).read())
            found["content_sha256"] = content.hexdigest()
        return found


def open_pickle(
    paths: Sequence[Path],
    source: str,
    *,
    config: Mapping[str, Any],
    revision: str = "",
    weights: Mapping[str, str] | None = None,
) -> PickleStore:
    """Open one torch file, or the shards of a checkpoint; no code in them is run.

    `source` is the path or hub id that opens it again. `weights` is the index, the file of each tensor: it
    decides if two files hold the same tensor. Raises `CheckpointError` for a file that would run code, is not
    a torch file, or holds no model.
    """
    files = [LocalFile(path) for path in paths]
    return PickleStore(source, files, config=config, revision=revision, weights=weights)


def _left_out(ignored: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    found = [(path, *count) for path, count in ignored.items() if count[0]]
    for path, tensors, elements in found[:_NOTES]:
        yield f"{plain(path)} was left out ({tensors:,} tensors, {elements:,} elements)."
    if len(found) > _NOTES:
        yield f"{len(found) - _NOTES:,} more were left out."


def _opened(file: LocalFile) -> tuple[Contents, dict[str, Placed]]:
    """Return the tensors of the model in a file, and their places."""
    saved = open_torch_file(file)
    contents = unwrap(saved.value, file.name)
    return contents, {
        name: _place(file, name, tensor, saved.storages) for name, tensor in contents.tensors.items()
    }


def _place(file: LocalFile, name: str, tensor: Stored, storages: Mapping[str, Span]) -> Placed:
    """Return the place of a tensor; raises `CheckpointError` if its storage does not contain it."""
    width = WIDTHS[tensor.dtype]
    if tensor.storage is None:
        raise CheckpointError(file.name, "was saved without values", key=name)
    storage = storages.get(tensor.storage.key)
    if storage is None:
        reason = f"is broken: its storage {quoted(tensor.storage.key)} is not in the file"
        raise CheckpointError(file.name, reason, key=name, fix="Download it again")
    header = Header(tensor.shape, tensor.dtype)
    where = Placed(storage, tensor.offset, header, tensor.strides, _end_to_end(tensor))
    size = storage.stop - storage.start
    # With strides of 0 a tensor of a few bytes could claim any number of elements.
    if tensor.size * width > size:
        reason = f"claims more elements than it holds: {tensor.size:,} in {size:,} bytes"
        raise CheckpointError(file.name, reason, key=name)
    if min((where.offset, *where.strides)) < 0 or (
        where.extent and (where.offset + where.extent) * width > size
    ):
        raise CheckpointError(file.name, f"reaches beyond the {size:,} bytes of its storage", key=name)
    return where


def _end_to_end(tensor: Stored) -> bool:
    """Return whether the elements are stored one after the other, in row-major order."""
    step = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        # The stride of a dimension of length 1 is never used.
        if length != 1 and stride != step and tensor.size:
            return False
        step *= length
    return True


def _tied(placed: Mapping[str, Placed]) -> dict[str, str]:
    """Map names of the same bytes to the one that is kept: that of an embedding if there is one."""
    groups: dict[object, list[str]] = {}
    for name, where in placed.items():
        if where.extent:
            groups.setdefault((*where[1:], where.storage.key), []).append(name)
    tied: dict[str, str] = {}
    for names in groups.values():
        kept = next((name for name in names if "embed" in name), names[0])
        tied |= {name: kept for name in names if name != kept}
    return tied


def _gathered(where: Placed) -> "Tensor":
    """Read a tensor whose elements are not stored in row-major order."""
    import torch

    from affectlens.checkpoints.slicing import tensor_of

    shape, strides, extent = where.header.shape, where.strides, where.extent
    outer = max(range(len(shape)), key=lambda dim: strides[dim] if shape[dim] > 1 else 0)
    inner = extent - (shape[outer] - 1) * strides[outer]
    # Some rows of a transposed matrix are a short strip of every stored row: with the gaps, the whole matrix.
    sparse = shape[outer] > 1 and extent > 2 * math.prod(shape)
    if sparse and (inner * where.width >= _STRIP or extent * where.width > _FAR):
        header = where.header._replace(shape=(*shape[:outer], 1, *shape[outer + 1 :]))
        starts = range(where.offset, where.offset + shape[outer] * strides[outer], strides[outer])
        return torch.cat([_gathered(where._replace(offset=s, header=header)) for s in starts], outer)
    flat = tensor_of(where.part(where.offset, extent), where.header._replace(shape=(extent,)))
    return flat.as_strided(shape, strides).clone(memory_format=torch.contiguous_format)
