"""Every error affectlens raises: what you asked, what is there, what to try.

    AffectlensError
    ├── CheckpointError      (ValueError)       a file that can't be read as a checkpoint
    ├── NothingToCompare     (ValueError)       two checkpoints that share no parameter
    ├── NoSuchSite           (KeyError)         a selection that matches nothing
    ├── WrongCount           (ValueError)       a selection that matches more or fewer than expected
    ├── TaskError            (ValueError)       examples or labels that can't be judged
    ├── LensError            (RuntimeError)     a live model that can't be loaded, addressed or changed
    ├── JournalError         (ValueError)       a file that is no journal of a sweep, or can't be written
    ├── ExecutionError       (RuntimeError)     work that failed wherever it was tried, or workers that die
    ├── RoleRefuted          (ValueError)       a live model contradicts what a parameter is said to do
    ├── TableError           (ValueError)       a result file or column that isn't there
    ├── WriteError           (OSError)          a file that can't be written; what was there stays
    └── MissingExtra         (ImportError)      an optional package that isn't installed

Each is also the built-in named beside it, so ordinary `except` clauses keep working. `Remark` is a warning:
what is done is right, and would be misread without it.
"""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from affectlens.printable import plain, sentence

_NAME, _FOLDERS, _FILE, _WORDS = 120, 100, 255, 600  # characters that an error has room for


class AffectlensError(Exception):
    """The root: catch it to catch everything affectlens raises on purpose."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message; and a name in it may hold what a terminal obeys.
        return sentence(self.args[0]) if self.args else ""


class CheckpointError(AffectlensError, ValueError):
    """Say which file, which tensor, what is wrong with it and what to try: one line, fit to print."""

    def __init__(self, path: str | Path, reason: str, *, key: str | None = None, fix: str = "") -> None:
        self.path, self.reason, self.key, self.fix = str(path), reason, key, fix
        where = _place(str(path)) + ": " + (f"tensor {quoted(key)}: " if key is not None else "")
        told = f"{reason}. {fix}" if fix else reason
        Exception.__init__(self, where + sentence(told, _WORDS))

    def __reduce__(self) -> "tuple[object, ...]":
        # A worker's error travels: by default it would be made anew from its message alone.
        return _told_again, (self.path, self.reason, self.key, self.fix)


def _told_again(path: str, reason: str, key: str | None, fix: str) -> CheckpointError:
    return CheckpointError(path, reason, key=key, fix=fix)


class NothingToCompare(AffectlensError, ValueError):
    """Two checkpoints share no parameter."""


class NoSuchSite(AffectlensError, KeyError):
    """A selection matches no site."""


class WrongCount(AffectlensError, ValueError):
    """A selection does not have the number of sites that was expected of it."""


class TaskError(AffectlensError, ValueError):
    """A task or one of its examples can't be read or judged."""


class LensError(AffectlensError, RuntimeError):
    """A live model can't be loaded, addressed or changed as asked."""


class JournalError(AffectlensError, ValueError):
    """A journal can't be read or written."""


class ExecutionError(AffectlensError, RuntimeError):
    """Parts of the work failed wherever they were tried, or no worker stays alive."""


class RoleRefuted(AffectlensError, ValueError):
    """A live model contradicts what its parameters' names say they do."""


class TableError(AffectlensError, ValueError):
    """A result table can't be read, written or aggregated as asked."""


class WriteError(AffectlensError, OSError):
    """A file can't be written; what was there before is as it was."""


class MissingExtra(AffectlensError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


class Remark(UserWarning):
    """Something that a result can't be read without; told once, as a warning that can be made an error."""


def quoted(name: object) -> str:
    """Quote a name that comes from a file: fit to print, its middle left out where it is long.

    >>> quoted("a\\x1b[31mb"), len(quoted("x" * 100_000))
    ("'a�[31mb'", 122)
    """
    return f"'{plain(name, _NAME)}'"


def _place(path: str) -> str:
    """A path in which folders make room for the name of the file, where it is too long."""
    name = os.path.split(path)[1]
    return plain(path[: len(path) - len(name)], _FOLDERS) + plain(name, _FILE)


def near(asked: object, known: Iterable[object], *, most: int = 8) -> str:
    """Say what is there, and what was probably meant.

    >>> near("gate", ["gate_proj", "up_proj"])
    "gate_proj, up_proj. Did you mean 'gate_proj'?"
    """
    names = [plain(name) for name in known]
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    close = difflib.get_close_matches(plain(asked), names, 1, cutoff=0.4)
    return shown + (f". Did you mean {close[0]!r}?" if close else "")
