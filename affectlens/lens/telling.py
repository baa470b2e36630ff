"""What transformers raises, told as ours: one line, whatever it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from affectlens.errors import AffectlensError, LensError

_LONGEST = 300  # characters
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raise what breaks in the block as a `LensError` that begins with `what`.

    Our own errors pass as they are, and so does memory that ran out: a smaller batch may fit.
    """
    try:
        yield
    except AffectlensError:
        raise
    except BaseException as error:
        if not broken(error) or out_of_memory(error):
            raise
        raise LensError(f"{what}: {line(error)}") from error


def broken(error: BaseException) -> bool:
    """Whether an error says that something broke, and not that someone wants to stop."""
    # The tokenizers' panic, as when a pattern takes too many steps, is no Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, a device's, or an allocator's in its words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY)


def line(error: BaseException) -> str:
    """What an error says, in one line without control characters; with its type where that is little."""
    words = " ".join(str(error).partition("Exception raised from")[0].split())
    words = words if len(words) > 20 else f"{type(error).__name__} {words}".strip()
    return "".join(c for c in words[:_LONGEST] if c.isprintable())
