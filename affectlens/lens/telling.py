"""What transformers raises, told as ours: one line, whatever it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from affectlens.errors import AffectlensError, LensError

_LONGEST = 300  # characters


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raise what breaks in the block as a `LensError` that begins with `what`; our own errors as they are."""
    try:
        yield
    except AffectlensError:
        raise
    except BaseException as error:
        if not broken(error):
            raise
        raise LensError(f"{what}: {line(error)}") from error


def broken(error: BaseException) -> bool:
    """Whether an error says that something broke, and not that someone wants to stop."""
    # The tokenizers' panic, as when a pattern takes too many steps, is no Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def line(error: BaseException) -> str:
    """What an error says, in one line without control characters; with its type where that is little."""
    words = " ".join(str(error).partition("Exception raised from")[0].split())
    words = words if len(words) > 20 else f"{type(error).__name__} {words}".strip()
    return "".join(c for c in words[:_LONGEST] if c.isprintable())
