"""Bytes at rest, fetched by their place: what every format comes down to, on disk, in memory or on a hub.

Files are read, never mapped: a file that is cut short while it is mapped kills the process.
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
FIRST = 512  # bytes that tell; a tar archive says what it is at 257
_UNPACK = "Unpack it first"
_EVERYWHERE = (
    (rb"version https://git-lfs", "this is a Git LFS pointer, not the file", "Run `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "this is a web page, probably an error page", DOWNLOAD_AGAIN),
    (
        rb"GGUF",
        "this is a GGUF file, llama.cpp's format, which is not read here",
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
    """A run of bytes that doesn't change."""

    name: str  # the path or address, for people
    size: int
    remote: bool  # whether fetching costs a journey

    @property
    def key(self) -> Hashable:
        """What tells contents apart: two with one key hold the same bytes."""
        ...

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """The bytes from `start` to `stop`: read into `into`, or where they lie. Safe from many threads.

        Raises `CheckpointError` where they can't be had.
        """
        ...

    def check(self) -> None:
        """Raise `CheckpointError` if what was fetched may be of two versions of the file."""
        ...


class Span(NamedTuple):
    """Some of the bytes: those of a tensor, or of a part of it."""

    of: Bytes
    start: int
    stop: int

    @property
    def key(self) -> Hashable:
        """Equal for spans that hold the same bytes."""
        return self.of.key, self.start, self.stop

    def part(self, start: int, stop: int) -> "Span":
        """A part, by its place within this one."""
        return Span(self.of, self.start + start, self.start + stop)

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """A part's bytes, by its place within this one."""
        return self.of.fetch(self.start + start, self.start + stop, into=into)

    def read(self) -> bytearray:
        """All of the bytes, in new memory."""
        found = bytearray(self.stop - self.start)
        got = self.fetch(0, len(found), into=memoryview(found))
        if got.obj is not found:
            found[:] = got
        return found


class LocalFile:
    """A file of this machine; open from the start, so that what is read is what was looked at."""

    remote = False

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._descriptor = opened(path)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = _state(os.fstat(self._descriptor))
        self.size = self._state.size

    @property
    def key(self) -> Hashable:
        """Device and inode: links to one file are one content."""
        return "file", self._state.device, self._state.inode

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """Read into the buffer."""
        wanted, done = into[: stop - start], 0
        if len(wanted) < stop - start:
            raise ValueError(f"{stop - start} bytes into a buffer of {len(into)}")
        while done < len(wanted):
            try:
                got = os.preadv(self._descriptor, [wanted[done:]], start + done)
            except OSError as error:
                raise CheckpointError(self.path, f"can't be read ({error.strerror})") from None
            if not got:
                reason = f"changed while it was read: it ends at byte {start + done:,}"
                raise CheckpointError(self.path, reason, fix=AGAIN)
            done += got
        return wanted

    def check(self) -> None:
        """Raise `CheckpointError` if the file is not the one that was opened, or was written to."""
        try:
            now = _state(self.path.stat())
        except OSError:
            raise CheckpointError(self.path, "vanished while it was read", fix=AGAIN) from None
        # A second name, which an edited copy may be given, sets that last time too.
        named = now.names != self._state.names
        if now != self._state and not (named and now[:4] == self._state[:4]):
            raise CheckpointError(self.path, "changed while it was read", fix=AGAIN)


class _State(NamedTuple):
    """What tells a file from another, and from itself once it was written to."""

    device: int
    inode: int
    size: int
    written: int
    changed: int  # no program can set this time back
    names: int  # hard links


def _state(found: os.stat_result) -> _State:
    return _State(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink
    )


def refuse_impostors(path: str, first: bytes, *, others: Iterable[tuple[bytes, str, str]]) -> None:
    """Raise `CheckpointError` for what is known by its first bytes; `others` are of one format alone."""
    for magic, reason, fix in (*_EVERYWHERE, *others):
        if re.match(magic, first, re.IGNORECASE | re.DOTALL):
            raise CheckpointError(path, reason, fix=fix)
