"""Every error that affectlens raises; a message says what you asked, what is there, and what to try.

    AffectlensError
    ├── CheckpointError      (ValueError)       a file can't be read as a checkpoint
    ├── NothingToCompare     (ValueError)       two checkpoints share no parameter
    ├── NoSuchSite           (KeyError)         a selection matches nothing
    ├── WrongCount           (ValueError)       a selection has more or fewer sites than expected
    ├── TaskError            (ValueError)       a task or an example can't be read or judged
    ├── LensError            (RuntimeError)     a live model can't be loaded, addressed or changed
    ├── JournalError         (ValueError)       the journal of a sweep can't be read or written
    ├── ExecutionError       (RuntimeError)     a job fails on every try, or every worker dies
    ├── RoleRefuted          (ValueError)       a live model contradicts the role of a parameter
    ├── TableError           (ValueError)       a result file or a column is missing or wrong
    ├── WriteError           (OSError)          a file can't be written; the earlier one stays
    └── MissingExtra         (ImportError)      an optional package isn't installed

Each error is also the built-in in brackets, so `except ValueError` and the like work. `Remark` is a warning:
the result is right, but easy to misread without it.
"""

import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from affectlens.printable import plain, sentence

# The most characters that a message has for a name, the folders of a path, a file name, and the reason.
_NAME, _FOLDERS, _FILE, _REASON = 120, 100, 255, 600
_OURS = ("affectlens", "contextlib")  # frames that a user did not write


class AffectlensError(Exception):
    """The base class: catch it to catch every error that affectlens raises on purpose.

    >>> import affectlens as al
    >>> sites = al.Sites([al.Site("language", "gate_proj", layer=0), al.Site("language", "up_proj", layer=0)])
    >>> try:
    ...     sites.where(role="gate")
    ... except al.AffectlensError as error:
    ...     print(f"{type(error).__name__}: {error}")
    NoSuchSite: no site has role='gate'. Roles here: gate_proj, up_proj. Did you mean 'gate_proj'?
    """

    def __str__(self) -> str:
        # KeyError would print the repr of the message. A name in it may hold control characters.
        return sentence(self.args[0]) if self.args else ""


class CheckpointError(AffectlensError, ValueError):
    """A file can't be read as a checkpoint: names the file, the tensor, the reason and a remedy."""

    def __init__(self, path: str | Path, reason: str, *, key: str | None = None, fix: str = "") -> None:
        self.path, self.reason, self.key, self.fix = str(path), reason, key, fix
        where = _fitted(str(path)) + ": " + (f"tensor {quoted(key)}: " if key is not None else "")
        why = f"{reason}. {fix}" if fix else reason
        Exception.__init__(self, where + sentence(why, _REASON))

    def __reduce__(self) -> "tuple[object, ...]":
        # By default a worker's error would be rebuilt here from its message alone.
        return _rebuilt, (self.path, self.reason, self.key, self.fix)


def _rebuilt(path: str, reason: str, key: str | None, fix: str) -> CheckpointError:
    return CheckpointError(path, reason, key=key, fix=fix)


class NothingToCompare(AffectlensError, ValueError):
    """Two checkpoints share no parameter."""


class NoSuchSite(AffectlensError, KeyError):
    """A selection matches no site."""


class WrongCount(AffectlensError, ValueError):
    """A selection has another number of sites or points than expected."""


class TaskError(AffectlensError, ValueError):
    """A task or one of its examples can't be read or judged."""


class LensError(AffectlensError, RuntimeError):
    """A live model can't be loaded, addressed or changed as asked."""


class JournalError(AffectlensError, ValueError):
    """The journal of a sweep can't be read or written."""


class ExecutionError(AffectlensError, RuntimeError):
    """A job fails on every try, or an executor has no worker left."""


class RoleRefuted(AffectlensError, ValueError):
    """A live model contradicts the roles that its parameter names suggest."""


class TableError(AffectlensError, ValueError):
    """A result table can't be read, written or aggregated as asked."""


class WriteError(AffectlensError, OSError):
    """A file can't be written; an earlier file of that name is unchanged."""


class MissingExtra(AffectlensError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""


class Remark(UserWarning):
    """A warning that a result is easy to misread without; `warnings.simplefilter` can make it an error."""


def warn(words: str) -> None:
    """Warn with a `Remark` at the innermost line that is outside affectlens and `contextlib`."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(words, Remark, stacklevel=level)


def quoted(name: object) -> str:
    """Quote a name that comes from a file: fit to print, the middle left out if it is long.

    >>> quoted("a\\x1b[31mb"), len(quoted("x" * 100_000))
    ("'a�[31mb'", 122)
    """
    return f"'{plain(name, _NAME)}'"


def near(asked: object, known: Iterable[object], *, most: int = 8) -> str:
    """List the names that exist, and the one that was probably meant.

    >>> near("gate", ["gate_proj", "up_proj"])
    "gate_proj, up_proj. Did you mean 'gate_proj'?"
    >>> near("gate", [])
    'none'
    """
    names = [plain(name) for name in known]
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    close = difflib.get_close_matches(plain(asked), names, 1, cutoff=0.4)
    return (shown or "none") + (f". Did you mean {close[0]!r}?" if close else "")


def unmatched(noun: str, name: str, *, choice: object, known: Iterable[object], title: str = "Here") -> str:
    """Say that nothing in a selection has a value, and list the values that exist.

    >>> unmatched("site", "role", choice="gate", known=["gate_proj"], title="Roles here")
    "no site has role='gate'. Roles here: gate_proj. Did you mean 'gate_proj'?"
    >>> unmatched("row", "layer", choice=lambda layer: layer > 9, known=[0, 1])
    'no row has a layer that satisfies the function. Here: 0, 1'
    """
    if callable(choice):
        return f"no {noun} has a {name} that satisfies the function. {title}: {near('', known)}"
    meant = choice if isinstance(choice, str) else ""  # no number is a misspelling of another
    return f"no {noun} has {name}={choice!r}. {title}: {near(meant, known)}"


def _fitted(path: str) -> str:
    """Shorten the folders of a long path, so that the file name stays whole."""
    name = os.path.split(path)[1]
    return plain(path[: len(path) - len(name)], _FOLDERS) + plain(name, _FILE)
