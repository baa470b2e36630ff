"""Bytes into files: runs of a file as they are, tensors some rows at a time. Memory holds a block of each.

Where a layout has the rows of a site apart (turned matrices, stacked experts), the block is a matrix.
"""

import errno
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import torch

from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.joined import JoinedStore
from affectlens.files import opened
from affectlens.interventions.writing.edited import EditedStore

Weights = EditedStore | JoinedStore  # what can be written
BLOCK = 1 << 20  # bytes; memory of this size is used again, larger ones are new pages each time
_AT_ONCE = 1 << 22  # bytes that the system copies before an interrupt is answered
# What a system says that can't copy between these two files by itself.
_UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY)


def copy_file(file: LocalFile, into: Path, *, link: bool = False) -> None:
    """Make a copy of a file, or with `link` the same file under another name, where the disk is the same."""
    if link:
        with suppress(OSError):
            os.link(os.path.realpath(file.path), into)
            return
    with FileIO(into, "xb") as stream:
        copy(file, stream, start=0, stop=file.size)


def copy(file: LocalFile, stream: FileIO, *, start: int, stop: int) -> None:
    """Append the bytes of a file from `start` to `stop`; what the system can share, it shares."""
    done = _by_system(file, start, stop, stream)
    buffer = memoryview(bytearray(max(0, min(BLOCK, stop - start - done))))
    while start + done < stop:
        piece = file.fetch(start + done, min(start + done + BLOCK, stop), into=buffer)
        write(piece, stream)
        done += len(piece)


def write(block: memoryview, stream: FileIO) -> None:
    """Append all of a block; a file written to without a buffer may take it in parts."""
    while len(block):
        block = block[stream.write(block) :]


def blocks(store: Weights, tensor: str) -> Iterator[memoryview]:
    """The bytes of a tensor as safetensors has them, made some rows at a time."""
    shape, dtype = store.headers[tensor]
    if 0 in shape:
        return  # of however many rows
    if not shape or (isinstance(store, EditedStore) and not store.by_rows(tensor)):
        yield _raw(store.read(tensor))
        return
    width = math.prod(shape[1:]) * getattr(torch, dtype).itemsize
    step = max(1, BLOCK // max(1, width))
    for first in range(0, shape[0], step):
        yield _raw(store.read(tensor, slice(first, min(first + step, shape[0]))))


def _raw(values: torch.Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found: memoryview = flat.numpy().data
    return found


def _by_system(file: LocalFile, start: int, stop: int, stream: FileIO) -> int:
    """Let the system copy, as far as it can; returns how many bytes it did."""
    copier = getattr(os, "copy_file_range", None)
    if copier is None:
        return 0
    source, done = opened(file.path), 0
    try:
        while start + done < stop:
            at = start + done
            # Up to a border of pages first: from there on whole ones are passed on, a third faster.
            got = copier(source, stream.fileno(), min(_AT_ONCE - at % _AT_ONCE, stop - at), at)
            if not got:
                break  # the end, or a system that copies nothing here: reading will tell
            done += got
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    finally:
        os.close(source)
    return done
