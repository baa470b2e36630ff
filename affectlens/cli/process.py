"""Run a verb in this process: keep libraries quiet, turn every outcome into an exit code, end on Ctrl-C."""

import io
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from affectlens.errors import AffectlensError
from affectlens.printable import seen, sentence

DEBUG = "AFFECTLENS_DEBUG"  # if set, errors end in their traceback
_LONGEST = 1000  # characters of an error message
_PATIENCE = 3.0  # seconds for an interrupted run to clean up
_interrupted = threading.Event()


class Ending(NamedTuple):
    """An exit code, and lines for standard error."""

    code: int
    message: str = ""

    def leave(self) -> None:
        """Print the message and end the process; return if the code is 0."""
        ignore()
        with suppress(OSError):
            print(self.message, end="\n" if self.message else "", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:
            # No reader, or a full disk. Drop the rest, or Python would report the error again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self.code:
            sys.exit(self.code)


def run() -> Ending:
    """Run the verb on the command line and return how it ended."""
    try:
        _prepare()
        # Calling the app instead would let click handle Ctrl-C and closed pipes, with other exit codes.
        with _command().make_context("affectlens", sys.argv[1:]) as context:
            context.command.invoke(context)
        sys.stdout.flush()
    except BaseException as error:
        return ending(error)
    return Ending(0)


@cache
def _command() -> Any:
    """Return the verbs as one command of click's; making it takes longer than some verbs."""
    from typer.main import get_command

    from affectlens.cli.verbs import app

    return get_command(app)


def ending(error: BaseException) -> Ending:
    """Return how a run ends that raised an error.

    After Ctrl-C, and with AFFECTLENS_DEBUG, the error is raised again.
    """
    if interrupted():
        raise error
    if isinstance(error, BrokenPipeError):
        return Ending(0)  # e.g. `| head`, which has read enough
    usage = getattr(error, "exit_code", None)  # on errors of typer and click
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


def listen() -> None:
    """Install the Ctrl-C handler, and a thread that ends the process if unwinding takes too long."""
    signal.signal(signal.SIGINT, _on_interrupt)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Written to by the signal itself; the Python handler runs only once a call into C has returned.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def interrupted() -> bool:
    """Return whether Ctrl-C was pressed, even if a library swallowed its exception."""
    return _interrupted.is_set()


def leave(error: BaseException | None = None) -> NoReturn:
    """End the process at once, even with imports half done and threads still running.

    What the interrupted run says of itself, e.g. what it kept, is printed with the command that goes on.
    """
    notes = [seen(note) for note in getattr(error, "__notes__", ())]
    again = [f"Go on with: {shlex.join(['affectlens', *sys.argv[1:]])}"] if notes else []
    with suppress(OSError):
        os.write(2, "\n".join(["interrupted", *notes, *again, ""]).encode("utf-8", "replace"))
    os._exit(130)


def ignore() -> None:
    """Ignore Ctrl-C from now on: the output is complete, and only cleaning up is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prepare() -> None:
    """Silence the libraries; make printing work with any character and with closed streams."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if DEBUG in os.environ:
        return
    logging.disable()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:  # otherwise the user asked for warnings
        warnings.simplefilter("ignore")


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


def _on_interrupt(_signal: int, _frame: FrameType | None) -> None:
    if interrupted():
        return  # a second exception would stop the cleaning up
    _interrupted.set()
    sys.unraisablehook = lambda _: None  # in a finalizer the exception would only print a traceback
    raise KeyboardInterrupt


def _watch(pipe: int) -> None:
    while os.read(pipe, 1) != bytes([signal.SIGINT]):
        pass
    time.sleep(_PATIENCE)
    leave()
