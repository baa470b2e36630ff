"""Media files from strangers: only ordinary files, read within a limit of size."""

import os
import stat
from pathlib import Path

from affectlens.errors import CheckpointError, TaskError, quoted
from affectlens.files import opened


def ordinary(source: str, what: str, *, most: int) -> Path:
    """Return the path if it is an ordinary file of at most `most` bytes. Raises `TaskError`."""
    try:
        state = Path(source).stat()
    except (OSError, ValueError):
        raise TaskError(f"{quoted(source)}: no such {what}") from None
    if not stat.S_ISREG(state.st_mode):
        raise TaskError(f"{quoted(source)}: this is not an ordinary file")  # a pipe or device would never end
    if state.st_size > most:
        raise TaskError(f"{quoted(source)}: larger than {most:,} bytes")
    return Path(source)


def content(source: str, what: str, *, most: int) -> bytes:
    """Read a file. Raises `TaskError` for one that is missing, can't be read, or is too large."""
    path = ordinary(source, what, most=most)
    try:
        with os.fdopen(opened(path), "rb") as stream:
            found = stream.read(most + 1)
    except (CheckpointError, OSError):
        raise TaskError(f"{quoted(source)}: this {what} can't be read") from None
    if len(found) > most:
        raise TaskError(f"{quoted(source)}: larger than {most:,} bytes")
    return found
