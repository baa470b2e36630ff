"""Writing files whole or not at all, and opening only what is an ordinary file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from affectlens.errors import CheckpointError


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place only if the block succeeds.

    An earlier file stays readable until then, and after an error nothing is left behind.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.stem}-", suffix=final.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def ordinary(path: Path) -> Path:
    """Return `path` if it is an ordinary file; a pipe or device would block a reader for ever."""
    if not path.exists():
        raise CheckpointError(path, "there is no such file")
    if not path.is_file():
        raise CheckpointError(path, "this is not an ordinary file")
    return path


def _umask() -> int:
    # The only portable way to read the mask is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
