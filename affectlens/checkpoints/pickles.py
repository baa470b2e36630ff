"""The store over torch's own files: `.bin`, `.pth`, `.pt`, whole or in shards.

    file ── envelopes.open_archive ──▶ torch.load(weights_only=True) ── envelopes.unwrap ──▶ spans

A pickle is a program, so it is only ever given to torch's restricted reader, which knows tensors and
containers; what that refuses is refused. Opening gives each tensor its place in the file, and its bytes
are fetched from there, as with safetensors. Files of before torch 1.6, and what has no such place, are
read into memory.
"""

import hashlib
import json
import math
import pickle
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from affectlens.checkpoints.bytes import Bytes, LocalFile, Span
from affectlens.checkpoints.checkpoint import Header
from affectlens.checkpoints.envelopes import CONVERT, Contents, open_archive, recognised, refused, unwrap
from affectlens.checkpoints.memory import TensorBytes
from affectlens.checkpoints.safetensors import HASHED
from affectlens.checkpoints.slicing import tensor_of
from affectlens.errors import CheckpointError
from affectlens.html import plain

_HELD = 2_000_000_000  # bytes; what is read into memory may have
_STRIP = 4096  # bytes; fetching shorter ones costs more than what lies between them
_LOCK = Lock()  # what torch allows, and which warnings show, is the whole process's


class Placed(NamedTuple):
    """Where the elements of a tensor lie: in a storage, from an offset on, strides apart."""

    storage: Span
    offset: int  # in elements, as the strides are
    header: Header
    strides: tuple[int, ...]
    contiguous: bool

    @property
    def kind(self) -> torch.dtype:
        """The dtype, as torch's."""
        found: torch.dtype = getattr(torch, self.header.dtype)
        return found

    @property
    def extent(self) -> int:
        """Elements from the first to the last, those between them included."""
        shape = self.header.shape
        steps = sum((length - 1) * stride for length, stride in zip(shape, self.strides, strict=True))
        return 0 if 0 in shape else steps + 1

    def part(self, start: int, count: int) -> Span:
        """Some elements of the storage."""
        width = self.kind.itemsize
        return self.storage.part(start * width, (start + count) * width) if count else self.storage.part(0, 0)


class PickleStore:
    """Read tensors from torch's files; opening reads names, shapes and places only.

    `aliases`, also `tied`, maps names that share their bytes with another to that one; they are not in
    `headers`. `ignored` counts what was saved beside the model: key path → (tensors, elements).
    """

    format = "pickle"

    def __init__(
        self, source: str, files: Sequence[LocalFile], *, config: Mapping[str, Any], revision: str = ""
    ) -> None:
        self.source, self.config, self.revision = source, config, revision
        self.name = Path(source).name if Path(source).exists() else source
        self.files = sorted(files, key=lambda file: file.name)
        self.ignored: dict[str, tuple[int, int]] = {}
        self.aliases: dict[str, str] = {}
        self.skipped: dict[str, tuple[str, int]] = {}
        self._placed: dict[str, Placed] = {}
        for file in self.files:
            contents, placed = _opened(file)
            for tensor in sorted(placed.keys() & (self._placed.keys() | self.aliases.keys())):
                raise CheckpointError(file.name, "also stored in another shard", key=tensor)
            for path, (tensors, elements) in contents.ignored.items():
                known = self.ignored.get(path, (0, 0))
                self.ignored[path] = known[0] + tensors, known[1] + elements
            self.skipped |= contents.skipped
            self.aliases |= (tied := _tied(placed))
            self._placed |= {tensor: where for tensor, where in placed.items() if tensor not in tied}
        self.headers: Mapping[str, Header] = {tensor: where.header for tensor, where in self._placed.items()}
        self.tied: Mapping[str, str] = self.aliases
        self.notes: tuple[str, ...] = tuple(
            f"{plain(path)} was left out ({tensors:,} tensors, {elements:,} elements)."
            for path, (tensors, elements) in self.ignored.items()
            if tensors
        )

    def span(self, tensor: str) -> Span | None:
        """Where the bytes of a tensor are; None where they don't lie end to end."""
        where = self._placed[tensor]
        return where.part(where.offset, where.extent) if where.contiguous else None

    def read(self, tensor: str, rows: slice | None = None) -> Tensor:
        """Return a tensor as stored, or some of its rows."""
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
    paths: Sequence[Path], source: str, *, config: Mapping[str, Any], revision: str = ""
) -> PickleStore:
    """Open one file of torch's, or the shards of a checkpoint; nothing in them is run.

    `source` is what opens it again. Raises `CheckpointError` for what torch's restricted reader refuses,
    for what is no such file, and for what holds no model.
    """
    return PickleStore(source, [LocalFile(path) for path in paths], config=config, revision=revision)


def _opened(file: LocalFile) -> tuple[Contents, dict[str, Placed]]:
    """The model's tensors in a file and their places."""
    loaded, locate = _from_archive(file) if recognised(file) == "zip" else _from_memory(file)
    contents = unwrap(loaded, file.name)
    placed = {name: _place(file, name, tensor, locate(tensor)) for name, tensor in contents.tensors.items()}
    return contents, placed


_Locate = Callable[[Tensor], Span | None]


def _from_archive(file: LocalFile) -> tuple[object, _Locate]:
    """What a zipped torch file holds, without values, and what finds a tensor's storage in the file."""
    archive = open_archive(file)
    if not hasattr(torch.UntypedStorage, "_checkpoint_offset"):  # torch's, and it may go
        return _from_memory(file, mapped=True)
    try:
        with _valueless():
            loaded = _unpickled(file, archive.outline, to="meta")
    except NotImplementedError:  # torch knows no quantized or nested tensors without values
        return _from_memory(file, mapped=True)

    def locate(tensor: Tensor) -> Span | None:
        return archive.storages.get(tensor.untyped_storage()._checkpoint_offset or -1)

    return loaded, locate


def _from_memory(file: LocalFile, *, mapped: bool = False) -> tuple[object, _Locate]:
    """What a torch file holds, read whole, and what finds a tensor's storage in memory.

    `mapped` is for archives: there torch cuts what claims more bytes than there are, and does not
    otherwise. The storages are copied, since a mapped file that is cut short kills the process.
    """
    if file.size > _HELD:
        reason = f"can only be read into memory, and is too large for that: {file.size:,} bytes"
        raise CheckpointError(file.name, reason, fix=CONVERT)
    try:
        if mapped:
            loaded = _unpickled(file, str(file.path), to="cpu", mmap=True)
        else:
            with file.path.open("rb") as stream:
                loaded = _unpickled(file, stream, to="cpu")
    except NotImplementedError:
        raise CheckpointError(file.name, "holds tensors of a kind that torch can't read here") from None
    file.check()
    held: dict[int, Bytes] = {}

    def locate(tensor: Tensor) -> Span | None:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu":
            return None
        place = storage.data_ptr() or id(storage)
        if place not in held:
            kept = storage.clone() if mapped else storage  # type: ignore[no-untyped-call]
            held[place] = TensorBytes(torch.empty(0, dtype=torch.uint8).set_(kept), file.name)
        return Span(held[place], 0, held[place].size)

    return loaded, locate


def _valueless() -> AbstractContextManager[object]:
    """In which torch reads no value of what it loads to 'meta'."""
    if hasattr(torch.serialization, "_is_meta_location"):
        return nullcontext()
    # Older torch does so in a fake mode alone, which takes seconds to import.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _unpickled(file: LocalFile, source: str | IO[bytes], *, to: str, mmap: bool = False) -> object:
    """Let torch's restricted reader read; raises `CheckpointError` for all that it refuses."""
    try:
        with _LOCK, torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, map_location=to, weights_only=True, mmap=mmap)
    except NotImplementedError:
        raise
    except pickle.UnpicklingError as error:
        raise refused(file.name, str(error)) from None
    except Exception as error:  # a broken pickle fails anywhere in torch's reader
        reason = f"is broken, or no torch file ({type(error).__name__})"
        raise CheckpointError(file.name, reason, fix="Download it again") from None


def _allowed() -> list[Any]:
    # A Namespace holds attributes and has no code of its own; the settings of many a run are one. Torch
    # forgets afterwards what it was told to allow here, so what the user allowed is not told again.
    return [Namespace] if Namespace not in torch.serialization.get_safe_globals() else []


def _place(file: LocalFile, name: str, tensor: Tensor, storage: Span | None) -> Placed:
    """Where a tensor lies; raises `CheckpointError` where its storage does not hold it."""
    header = Header(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if storage is None:
        raise CheckpointError(file.name, "was saved without values", key=name)
    where = Placed(storage, int(tensor.storage_offset()), header, tensor.stride(), tensor.is_contiguous())
    size = storage.stop - storage.start
    if tensor.numel() * where.kind.itemsize > size:
        reason = f"claims more elements than it holds: {tensor.numel():,} in {size:,} bytes"
        raise CheckpointError(file.name, reason, key=name)
    if min((where.offset, *where.strides)) < 0 or (
        where.extent and (where.offset + where.extent) * where.kind.itemsize > size
    ):
        raise CheckpointError(file.name, f"reaches beyond the {size:,} bytes of its storage", key=name)
    return where


def _tied(placed: Mapping[str, Placed]) -> dict[str, str]:
    """Names of the same bytes → the one that is kept: where it is an embedding's, that."""
    groups: dict[object, list[str]] = {}
    for name, where in placed.items():
        if where.extent:
            groups.setdefault((*where[1:], where.storage.key), []).append(name)
    kept = {
        name: next((name for name in names if "embed" in name), names[0])
        for names in groups.values()
        for name in names
    }
    return {name: other for name, other in kept.items() if name != other}


def _gathered(where: Placed) -> Tensor:
    """The values of a tensor whose elements don't lie end to end."""
    shape, strides, extent = where.header.shape, where.strides, where.extent
    outer = max(range(len(shape)), key=lambda dim: strides[dim] if shape[dim] > 1 else 0)
    inner = extent - (shape[outer] - 1) * strides[outer]
    # Rows of a transposed matrix are a strip of each stored row: what lies between would be all of it.
    if shape[outer] > 1 and extent > 2 * math.prod(shape) and inner * where.kind.itemsize >= _STRIP:
        header = where.header._replace(shape=(*shape[:outer], 1, *shape[outer + 1 :]))
        starts = range(where.offset, where.offset + shape[outer] * strides[outer], strides[outer])
        return torch.cat([_gathered(where._replace(offset=s, header=header)) for s in starts], outer)
    flat = tensor_of(where.part(where.offset, extent), where.header._replace(shape=(extent,)))
    return flat.as_strided(shape, strides).clone(memory_format=torch.contiguous_format)
