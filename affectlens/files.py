"""Write files completely or not at all, and open ordinary files only."""

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
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    An earlier file stays readable until then; on an error the temporary file is removed. If `path` is a
    symbolic link, its target is replaced. Raises `WriteError` if the folder, the disk or the block fails to
    write, or if a folder, pipe or device is in the place.
    """
    final = Path(os.path.realpath(path))
    # Writers choose a format by the suffix. The stem may be too long to add something to it.
    partial = final.parent / f".{secrets.token_hex(8)}{Path(path).suffix}"
    try:
        _refuse_others(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            open(partial, "xb").close()
            yield partial
            _sync(partial)
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, AffectlensError):
            raise
        reason = os.strerror(error.errno) if error.errno else error
        raise WriteError(f"{path}: can't be written ({reason})") from error
    with suppress(OSError):  # some systems can't sync a folder, and the file is in its place already
        _sync(final.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file completely or not at all; half surrogate pairs become `?`."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def opened(path: Path) -> int:
    """Open an ordinary file and return its descriptor. Raises `CheckpointError` for anything else.

    A pipe or device could block a reader forever, and opening a device may already have an effect.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer; Windows has neither flag.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        _check_ordinary(path, path.stat())
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, _reason(path, error)) from None
    try:
        _check_ordinary(path, os.fstat(descriptor))  # the file may have been replaced since
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_others(final: Path) -> None:
    """Raise `OSError` if something other than an ordinary file is in the place."""
    try:
        kind = final.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "")
    if not stat.S_ISREG(kind):
        raise OSError("this is not an ordinary file")


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk and survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_ordinary(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError(path, "this is not an ordinary file")


def _reason(path: Path, error: OSError | ValueError) -> str:
    """Say why a file can't be opened; a `ValueError` comes from a null character in the name."""
    if isinstance(error, FileNotFoundError):
        return "links to nothing" if path.is_symlink() else "there is no such file"
    words = error.strerror if isinstance(error, OSError) else error
    return f"can't be opened ({words})"
