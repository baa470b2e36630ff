"""Ctrl-C, answered in time: Python's own exception first, and an end to the process if that is not heard.

The exception unwinds what is open, so that no half-written file is left. But a library may swallow it,
and one long call into C, a decomposition say, holds it up: then a thread ends the process.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

_PATIENCE = 3.0  # seconds for unwinding
_heard = threading.Event()


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
