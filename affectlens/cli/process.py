"""Run a verb: keep the libraries quiet, parse the command line, and turn whatever happens into an end."""

import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from affectlens.errors import AffectlensError
from affectlens.printable import seen, sentence

DEBUG = "AFFECTLENS_DEBUG"  # set, it lets errors end in their traceback
_LONGEST = 1000
_PATIENCE = 3.0  # seconds for unwinding
_heard = threading.Event()


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


def run() -> Ending:
    """Run the verb that the command line asks for, and say how that ended."""
    try:
        _prepare()
        from typer.main import get_command

        from affectlens.cli.verbs import app

        # Not by calling the app: it has answers of its own to Ctrl-C and to a pipe that nobody reads.
        with get_command(app).make_context("affectlens", sys.argv[1:]) as context:
            context.command.invoke(context)
        sys.stdout.flush()
    except BaseException as error:
        return ending(error)
    return Ending(0)


def _prepare() -> None:
    """Let no library speak beside us, and no character or closed stream stop what is printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if DEBUG in os.environ:
        return
    logging.disable()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:  # else somebody asked for them
        warnings.simplefilter("ignore")


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


def listen() -> None:
    """Answer Ctrl-C so from now on."""
    signal.signal(signal.SIGINT, _hear)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Written to at once, where a handler waits until the interpreter is back from C.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def ignore() -> None:
    """Ignore it from now on: all is said, and what is left is tidying up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted() -> bool:
    """Whether Ctrl-C was heard, whatever became of its exception."""
    return _heard.is_set()


def _hear(_signal: int, _frame: FrameType | None) -> None:
    if interrupted():
        return  # a second one would break off the unwinding
    _heard.set()
    sys.unraisablehook = lambda _: None  # raised in a finalizer it could only print a traceback
    raise KeyboardInterrupt


def leave() -> NoReturn:
    """End the process at once, also where imports were broken off and threads still work."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


def _watch(pipe: int) -> None:
    while os.read(pipe, 1) != bytes([signal.SIGINT]):
        pass
    time.sleep(_PATIENCE)
    leave()
