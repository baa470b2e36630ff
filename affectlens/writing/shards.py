"""Write weights as safetensors: the files of a base with edits in them, or new files of any store.

safetensors ── rewrite: the same files, unedited bytes copied, edited tensors made ──┐
torch's     ── write_new: new shards, every tensor read and written ─────────────────┴─▶ a folder
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

import torch

from affectlens.checkpoints import Header
from affectlens.checkpoints.bytes import LocalFile, Span
from affectlens.checkpoints.safetensors import DTYPES, INDEX
from affectlens.checkpoints.store import JoinedStore
from affectlens.files import opened
from affectlens.progress import each
from affectlens.sites import bare_name
from affectlens.writing.edited_store import EditedStore

SINGLE = "model.safetensors"
SHARD = 5_000_000_000  # bytes
_KINDS = {dtype: kind for kind, (dtype, _) in DTYPES.items()}
Weights = EditedStore | JoinedStore
BLOCK = 1 << 20  # bytes; the allocator reuses memory of this size, and maps new pages for larger blocks
_AT_ONCE = 1 << 22  # bytes a call, since Ctrl-C waits for the end of the call
# Errors of a system that can't copy between these two files by itself.
_UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY)


def rewrite(
    store: Weights, files: Mapping[str, LocalFile], *, edited: Iterable[str], room: Path, link: bool
) -> None:
    """Write safetensors files under their new names; copy, or link, those without an edited tensor."""
    edits: dict[str, list[tuple[Span, str]]] = {name: [] for name in files}
    # A span names its file as an object, so the new name is looked up by identity.
    names = {id(file): name for name, file in files.items()}
    for tensor in edited:
        span = store.origin(tensor)
        assert span is not None, tensor
        edits[names[id(span.of)]].append((span, tensor))
    for name, file in each(files.items(), total=len(files), unit="file", what="write"):
        if not edits[name]:
            copy_file(file, room / name, link=link)
        else:
            with FileIO(room / name, "xb") as stream:
                _patched(store, file, stream, edits=sorted(edits[name], key=lambda edit: edit[0][1:]))


def write_new(store: Weights, room: Path, *, single: str = "") -> None:
    """Write a store's tensors into new files: one named `single`, or shards with an index."""
    tensors = {name: name for name in store.headers} | dict(_second_names(store))
    parts = [tensors] if single else list(_parts(store, tensors, limit=SHARD))
    files = [single or SINGLE] if len(parts) == 1 else _numbered(len(parts))
    for file, part in zip(files, parts, strict=True):
        _write_file(store, room / file, part)
    if len(parts) > 1:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        total = sum(_bytes(store.headers[tensor]) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (room / INDEX).write_text(json.dumps(index, indent=2), "utf-8")


def copy_file(file: LocalFile, into: Path, *, link: bool = False) -> None:
    """Copy a file; with `link`, give it a second name instead, where both are on one disk."""
    if link:
        with suppress(OSError):
            os.link(os.path.realpath(file.path), into)
            return
    with FileIO(into, "xb") as stream:
        copy(file, stream, start=0, stop=file.size)


def copy(file: LocalFile, stream: FileIO, *, start: int, stop: int) -> None:
    """Append the bytes of a file from `start` to `stop`; the system shares blocks where the disk can."""
    done = _by_system(file, start, stop, stream)
    buffer = memoryview(bytearray(max(0, min(BLOCK, stop - start - done))))
    while start + done < stop:
        piece = file.fetch(start + done, min(start + done + BLOCK, stop), into=buffer)
        write(piece, stream)
        done += len(piece)


def write(block: memoryview, stream: FileIO) -> None:
    """Append a block; an unbuffered file may take it in several parts."""
    while len(block):
        block = block[stream.write(block) :]


def blocks(store: Weights, tensor: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in the layout of safetensors, some rows at a time."""
    shape, dtype = store.headers[tensor]
    if 0 in shape:
        return  # a header may claim any number of empty rows
    if not store.by_rows(tensor):
        yield _raw(store.read(tensor))
        return
    width = math.prod(shape[1:]) * getattr(torch, dtype).itemsize
    step = max(1, BLOCK // max(1, width))
    for first in range(0, shape[0], step):
        yield _raw(store.read(tensor, slice(first, min(first + step, shape[0]))))


def _patched(store: Weights, file: LocalFile, stream: FileIO, *, edits: Sequence[tuple[Span, str]]) -> None:
    """Write a file with new bytes for some tensors; their length is that of the old ones."""
    at = 0
    for span, tensor in edits:
        copy(file, stream, start=at, stop=span.start)
        stored = store.span(tensor)
        if stored is not None and isinstance(stored.of, LocalFile):
            copy(stored.of, stream, start=stored.start, stop=stored.stop)
        else:
            for block in blocks(store, tensor):
                write(block, stream)
        at = span.stop
        assert stream.tell() == at, f"{tensor} has another length than before"
    copy(file, stream, start=at, stop=file.size)


def _second_names(store: Weights) -> Iterator[tuple[str, str]]:
    """Yield the second names of shared tensors, each with its tensor; not that of a tied output embedding.

    transformers ties that one itself, as the config says.
    """
    text = store.config.get("text_config")
    ties = any(
        part.get("tie_word_embeddings") is True for part in (store.config, text) if isinstance(part, Mapping)
    )
    for name, tensor in store.aliases.items():
        if not (ties and bare_name(name).endswith("lm_head.weight")):
            yield name, tensor


def _parts(store: Weights, tensors: Mapping[str, str], *, limit: int) -> Iterator[dict[str, str]]:
    part: dict[str, str] = {}
    size = 0
    for name, tensor in tensors.items():
        more = _bytes(store.headers[tensor])
        if part and size + more > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += more
    yield part


def _numbered(count: int) -> list[str]:
    return [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def _write_file(store: Weights, path: Path, tensors: Mapping[str, str]) -> None:
    """Write one file, widest numbers first, so that each tensor begins at a multiple of its width."""
    headers = {name: store.headers[tensor] for name, tensor in tensors.items()}
    ordered = sorted(headers, key=lambda name: (-_width(headers[name]), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        start, end = end, end + _bytes(headers[name])
        shape, dtype = headers[name]
        entries[name] = {"dtype": _KINDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    with FileIO(path, "xb") as stream:
        write(memoryview(len(raw).to_bytes(8, "little") + raw), stream)
        for name in ordered:
            for block in blocks(store, tensors[name]):
                write(block, stream)


def _width(header: Header) -> int:
    dtype: torch.dtype = getattr(torch, header.dtype)
    return dtype.itemsize


def _bytes(header: Header) -> int:
    return math.prod(header.shape) * _width(header)


def _raw(values: torch.Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found: memoryview = flat.numpy().data
    return found


def _by_system(file: LocalFile, start: int, stop: int, stream: FileIO) -> int:
    """Let the system copy as far as it can; return the number of bytes copied."""
    copier = getattr(os, "copy_file_range", None)
    if copier is None:
        return 0
    source, done = opened(file.path), 0
    try:
        while start + done < stop:
            at = start + done
            # Stop at page borders: from there on the system passes whole pages on, which is a third faster.
            got = copier(source, stream.fileno(), min(_AT_ONCE - at % _AT_ONCE, stop - at), at)
            if not got:
                break  # the end of the file, or a system that copies nothing: the caller reads the rest
            done += got
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    finally:
        os.close(source)
    return done
