"""How every run of the command line ends: an exit code, and what is told on standard error."""

import io
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from affectlens.cli.interrupting import ignore, interrupted
from affectlens.errors import AffectlensError
from affectlens.html import seen, sentence

DEBUG = "AFFECTLENS_DEBUG"  # set, it lets errors end in their traceback
_LONGEST = 1000


class Ending(NamedTuple):
    """An exit code, and lines for standard error."""

    code: int
    told: str = ""

    def leave(self) -> None:
        """End the process so; without an error to tell of, the caller goes on."""
        ignore()
        with suppress(OSError):
            print(self.told, end="\n" if self.told else "", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads it, or the disk is full: what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self.code:
            sys.exit(self.code)


def ending(error: BaseException) -> Ending:
    """How a run ends that raised an error; an interrupt goes on, and with AFFECTLENS_DEBUG every error."""
    if interrupted():
        raise error
    if isinstance(error, BrokenPipeError):
        return Ending(0)  # `| head` has read enough
    usage = getattr(error, "exit_code", None)  # of typer's and click's own
    if usage is not None:
        return Ending(usage, _usage(error))
    if DEBUG in os.environ or not isinstance(error, Exception):
        raise error
    if isinstance(error, AffectlensError):
        return Ending(1, f"error: {sentence(error, _LONGEST)}")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return Ending(1, "error: not enough memory for this")
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return Ending(1, f"error: {sentence(place + (error.strerror or str(error)), _LONGEST)}")
    return Ending(1, _internal(error))


def _usage(error: BaseException) -> str:
    show, lines = getattr(error, "show", None), io.StringIO()
    if show is not None:
        show(lines)
    return "\n".join(seen(line) for line in lines.getvalue().splitlines() if line)


def _internal(error: BaseException) -> str:
    words = sentence(f"{type(error).__name__}: {error}", _LONGEST)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"error: internal error: {words} ({Path(last.filename).name}, line {last.lineno})\n"
        f"This should not happen: please report it, with the traceback that {DEBUG}=1 shows"
    )
