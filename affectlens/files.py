"""Writing files whole or not at all, and opening only what is an ordinary file."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from affectlens.errors import AffectlensError, CheckpointError, WriteError


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place only if the block succeeds.

    An earlier file stays readable until then, and after an error nothing is left behind. Raises
    `WriteError` where the folder, the disk or the block's own writing fails, and for what is no ordinary
    file: a device would be replaced by one. Through a link, what it points to is written.
    """
    final = Path(os.path.realpath(path))
    # Writers go by the ending; the rest of a name may be too long for one beside it to be made of it.
    partial = final.parent / f".{secrets.token_hex(8)}{Path(path).suffix}"
    try:
        _free(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            open(partial, "xb").close()
            yield partial
            _settle(partial)
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, AffectlensError):
            raise
        reason = os.strerror(error.errno) if error.errno else error
        raise WriteError(f"{path}: can't be written ({reason})") from error
    with suppress(OSError):  # not every system can, and the file is in its place already
        _settle(final.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all; half of a surrogate pair, which is no text, becomes `?`."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def _free(final: Path) -> None:
    """Raise `OSError` where something stands in the place that is no ordinary file."""
    try:
        kind = final.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "")
    if not stat.S_ISREG(kind):
        raise OSError("this is not an ordinary file")


def _settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def opened(path: Path) -> int:
    """Open an ordinary file and return its descriptor. Raises `CheckpointError` for what is none.

    A pipe or device would block a reader for ever, and opening one may already do something.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        _ordinary(path, path.stat())
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, _reason(path, error)) from None
    try:
        _ordinary(path, os.fstat(descriptor))  # it may have been replaced since
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def _ordinary(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError(path, "this is not an ordinary file")


def _reason(path: Path, error: OSError | ValueError) -> str:
    """Why a file can't be opened; its name may be too long, or none at all."""
    if isinstance(error, FileNotFoundError):
        return "links to nothing" if path.is_symlink() else "there is no such file"
    words = error.strerror if isinstance(error, OSError) else error
    return f"can't be opened ({words})"
