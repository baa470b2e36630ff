"""Tables and JSON for the terminal, fit to print whatever a file called its tensors."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from affectlens.html import NULL, cell, plain, sentence

if TYPE_CHECKING:
    import pandas as pd


WIDTH = 100


def rows(frame: "pd.DataFrame", names: Sequence[str] = ()) -> list[str]:
    """Write the named columns of a frame (all by default) as aligned lines, a dash for null."""
    kept = [name for name in names or list(frame.columns) if name in frame]
    cells = [[cell(value) for value in row] for row in frame[kept].itertuples(index=False)]
    return aligned(kept, cells).splitlines()


def warned(findings: Iterable[object]) -> list[str]:
    """Write what must not be overlooked, each in full however long it is; each word as a name would be.

    >>> warned(["not\\x1b[31m the base"])
    ['! not�[31m the base']
    """
    words = (f"! {sentence(finding)}" for finding in findings)
    return [line for one in words for line in textwrap.wrap(one, WIDTH, subsequent_indent="  ")]


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set rows in columns, numbers to the right.

    >>> print(aligned(["role", "rms"], [["gate_proj", "0.1"], ["q", "0.25"]]))
    role        rms
    gate_proj   0.1
    q          0.25
    """
    cells = [list(map(plain, row)) for row in rows]
    grid = [list(map(plain, header)), *cells]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip()

    return "\n".join(line(row) for row in grid)


def _numeric(cell: str) -> bool:
    return not cell or cell[0] in "-+0123456789[" or cell in ("inf", "nan", NULL)
