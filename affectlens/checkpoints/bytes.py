"""Bytes addressed by their position, on disk, in memory or on a hub: every file format is read through these.

Files are read, never memory-mapped: a mapped file that is cut short kills the process.
"""

import os
import re
import weakref
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from affectlens.errors import CheckpointError
from affectlens.files import opened

DOWNLOAD_AGAIN = "Download it again"
AGAIN = "Run it again when nothing writes to it"
FIRST = 512  # bytes that identify a format; the mark of a tar archive is at byte 257
_UNPACK = "Unpack it first"
_EVERYWHERE = (
    (rb"version https://git-lfs", "this is a Git LFS pointer, not the file", "Run `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "this is a web page, probably an error page", DOWNLOAD_AGAIN),
    (
        rb"GGUF",
        "this is a GGUF file (llama.cpp), which is not supported",
        "Use the safetensors checkpoint that it was made from",
    ),
    (rb"\x89HDF", "this is an HDF5 file, probably from Keras", "Use the PyTorch checkpoint"),
    (rb"\x93NUMPY", "this is a NumPy array", "Use the PyTorch checkpoint"),
    (rb"\x1f\x8b", "this is gzip-compressed", _UNPACK),
    (rb"\xfd7zXZ", "this is xz-compressed", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "this is zstd-compressed", _UNPACK),
    (rb"BZh[1-9]1AY", "this is bzip2-compressed", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "this is a 7z archive", _UNPACK),
    (rb"Rar!", "this is a RAR archive", _UNPACK),
    (rb".{257}ustar", "this is a tar archive", _UNPACK),
    (
        rb"\x7fELF|MZ.{2}[^\0]|MZ.{6}[^\0]|\xcf\xfa\xed\xfe",
        "this is a program, not a checkpoint",
        "Don't run it",
    ),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP", "this is an image", DOWNLOAD_AGAIN),
    (rb"%PDF", "this is a PDF document", DOWNLOAD_AGAIN),
    (rb"\s*[{\[]\s*[\"{\[]", "this is JSON text, probably an error message or an index", DOWNLOAD_AGAIN),
)


class Bytes(Protocol):
    """Bytes that don't change, in one run."""

    name: str  # the path or address, for people
    size: int
    remote: bool  # whether each fetch is a request over the network

    @property
    def key(self) -> Hashable:
        """Identity of the content: equal keys mean equal bytes."""
        ...

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """Return the bytes from `start` to `stop`: read into `into`, or a view of memory. Thread-safe.

        Raises `CheckpointError` if they can't be read.
        """
        ...

    def check(self) -> None:
        """Raise `CheckpointError` if the fetched bytes may come from two versions of the file."""
        ...


class Span(NamedTuple):
    """A range of bytes: those of a tensor, or of a part of one."""

    of: Bytes
    start: int
    stop: int

    @property
    def key(self) -> Hashable:
        """Identity of the content: equal for spans that hold the same bytes."""
        return self.of.key, self.start, self.stop

    def part(self, start: int, stop: int) -> "Span":
        """Return a part of this span; `start` and `stop` count from its own start."""
        return Span(self.of, self.start + start, self.start + stop)

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """Return bytes of this span; `start` and `stop` count from its own start."""
        return self.of.fetch(self.start + start, self.start + stop, into=into)

    def read(self) -> bytearray:
        """Return a copy of all the bytes."""
        found = bytearray(self.stop - self.start)
        got = self.fetch(0, len(found), into=memoryview(found))
        if got.obj is not found:
            found[:] = got
        return found


class LocalFile:
    """A file on this machine, kept open: every read sees the file that was opened, even after a rename."""

    remote = False

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._descriptor = opened(path)
        # Closed with the object: hundreds of shards would use up the descriptors of a process.
        weakref.finalize(self, os.close, self._descriptor)
        self._state = _state(os.fstat(self._descriptor))
        self.size = self._state.size

    @property
    def key(self) -> Hashable:
        """Device and inode: links to one file have the same content."""
        return "file", self._state.device, self._state.inode

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """Read into the buffer `into`; raises `CheckpointError` if the file became shorter."""
        wanted, done = into[: stop - start], 0
        if len(wanted) < stop - start:
            raise ValueError(f"{stop - start} bytes don't fit a buffer of {len(into)}")
        while done < len(wanted):
            try:
                # One call may read less than asked for, on Linux at most 2 GiB.
                got = os.preadv(self._descriptor, [wanted[done:]], start + done)
            except OSError as error:
                raise CheckpointError(self.path, f"can't be read ({error.strerror})") from None
            if not got:
                reason = f"changed while it was read: it ends at byte {start + done:,}"
                raise CheckpointError(self.path, reason, fix=AGAIN)
            done += got
        return wanted

    def check(self) -> None:
        """Raise `CheckpointError` if the file was replaced or written to since it was opened."""
        try:
            now = _state(self.path.stat())
        except OSError:
            raise CheckpointError(self.path, "vanished while it was read", fix=AGAIN) from None
        # A new hard link, which an edited copy may be given, also sets the time of change.
        named = now.names != self._state.names
        if now != self._state and not (named and now[:4] == self._state[:4]):
            raise CheckpointError(self.path, "changed while it was read", fix=AGAIN)


def refuse_impostors(path: str, first: bytes, *, others: Iterable[tuple[bytes, str, str]]) -> None:
    """Raise `CheckpointError` if the first bytes are those of another format.

    `others` are the patterns, reasons and fixes that the expected format adds.
    """
    for magic, reason, fix in (*_EVERYWHERE, *others):
        if re.match(magic, first, re.IGNORECASE | re.DOTALL):
            raise CheckpointError(path, reason, fix=fix)


class _State(NamedTuple):
    """Facts of a file that differ from those of any other file, and change when it is written to."""

    device: int
    inode: int
    size: int
    written: int
    changed: int  # unlike `written`, no program can set this time back
    names: int  # hard links


def _state(found: os.stat_result) -> _State:
    return _State(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink
    )
