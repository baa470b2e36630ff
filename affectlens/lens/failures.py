"""Tell failures of models, processors and templates apart, and retell them in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from affectlens.errors import AffectlensError, LensError

_LONGEST = 300  # characters
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@contextmanager
def told(what: str) -> Iterator[None]:
    """Re-raise errors of the block as a `LensError` that begins with `what`.

    Errors of affectlens pass unchanged, and so do out-of-memory errors: a smaller batch may fit.
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
    """Return whether an error is a failure, not an interrupt or exit."""
    # A panic of the tokenizers library, e.g. of a regex that runs too long, is not an Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY)


def line(error: BaseException) -> str:
    """Return the message of an error on one line, printable; with its type where the message is short."""
    words = " ".join(str(error).partition("Exception raised from")[0].split())
    words = words if len(words) > 20 else f"{type(error).__name__} {words}".strip()
    return "".join(c for c in words[:_LONGEST] if c.isprintable())
