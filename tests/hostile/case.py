"""One hostile or broken input, and what the command line must make of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Case:
    """Build an input in a folder of its own and give the arguments of `affectlens`.

    `refused` ends with exit code 1 and one to three lines on standard error; `told` ends with 0 and says on
    standard output what is odd. `says` must all be in what is printed: the file's name, the tensor's, what
    is wrong.
    """

    name: str
    family: str
    build: Callable[[Path], list[str]]
    outcome: Literal["refused", "told"]
    says: tuple[str, ...]
