"""One hostile or broken input, and the required outcome on the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Case:
    """An input, built in a folder of its own; `build` returns the arguments of `affectlens`.

    `refused` ends with exit code 1 and one to three lines on standard error; `told` ends with 0 and says on
    standard output what is odd. All of `says` must be printed: the names of file and tensor, what is wrong.
    """

    name: str
    family: str
    build: Callable[[Path], list[str]]
    outcome: Literal["refused", "told"]
    says: tuple[str, ...]
