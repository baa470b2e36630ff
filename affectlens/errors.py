"""Every error affectlens raises: what you asked, what is there, what to try.

    AffectlensError
    ├── CheckpointError      (ValueError)       a file that can't be read as a checkpoint
    ├── NothingToCompare     (ValueError)       two checkpoints that share no parameter
    ├── NoSuchSite           (KeyError)         a selection that matches nothing
    ├── WrongCount           (ValueError)       a selection that matches more or fewer than expected
    ├── TaskError            (ValueError)       examples or labels that can't be judged
    ├── LensError            (RuntimeError)     a live model that can't be loaded, addressed or changed
    ├── RoleRefuted          (ValueError)       a live model contradicts what a parameter is said to do
    ├── TableError           (ValueError)       a result file or column that isn't there
    └── MissingExtra         (ImportError)      an optional package that isn't installed

Each is also the built-in named beside it, so ordinary `except` clauses keep working.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class AffectlensError(Exception):
    """The root: catch it to catch everything affectlens raises on purpose."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message, with quotes and escaped newlines.
        return str(self.args[0]) if self.args else ""


class CheckpointError(AffectlensError, ValueError):
    """Say which file, which tensor, what is wrong with it and what to try."""

    def __init__(self, path: str | Path, reason: str, *, key: str | None = None, fix: str = "") -> None:
        self.path, self.reason, self.key, self.fix = str(path), reason, key, fix
        where = f"{path}: " + (f"tensor {key!r}: " if key else "")
        Exception.__init__(self, where + reason + (f". {fix}" if fix else ""))


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


class RoleRefuted(AffectlensError, ValueError):
    """A live model contradicts what its parameters' names say they do."""


class TableError(AffectlensError, ValueError):
    """A result table can't be read, written or aggregated as asked."""


class MissingExtra(AffectlensError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


def near(asked: object, known: Iterable[object], *, most: int = 8) -> str:
    """Say what is there, and what was probably meant.

    >>> near("gate", ["gate_proj", "up_proj"])
    "gate_proj, up_proj. Did you mean 'gate_proj'?"
    """
    names = [str(name) for name in known]
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    close = difflib.get_close_matches(str(asked), names, 1, cutoff=0.4)
    return shown + (f". Did you mean {close[0]!r}?" if close else "")
