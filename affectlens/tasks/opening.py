"""Open what a task names: an ordinary file of a bounded size, or an error that says which one is none."""

import os
import stat
from pathlib import Path

from affectlens.errors import CheckpointError, TaskError, quoted
from affectlens.files import opened


def ordinary(source: str, what: str, *, most: int) -> Path:
    """The path of a file that can be opened. Raises `TaskError` for what is none, or is too large."""
    try:
        state = Path(source).stat()
    except (OSError, ValueError):
        raise TaskError(f"{quoted(source)}: there is no such {what}") from None
    if not stat.S_ISREG(state.st_mode):
        raise TaskError(f"{quoted(source)}: this is not an ordinary file")  # a pipe or device would never end
    if state.st_size > most:
        raise TaskError(f"{quoted(source)}: larger than {most:,} bytes")
    return Path(source)


def content(source: str, what: str, *, most: int) -> bytes:
    """The bytes of a file. Raises `TaskError` for what is none, can't be read, or is too large."""
    path = ordinary(source, what, most=most)
    try:
        with os.fdopen(opened(path), "rb") as stream:
            found = stream.read(most + 1)
    except (CheckpointError, OSError):
        raise TaskError(f"{quoted(source)}: this {what} can't be read") from None
    if len(found) > most:
        raise TaskError(f"{quoted(source)}: larger than {most:,} bytes")
    return found
