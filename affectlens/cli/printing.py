"""Tables and JSON for the terminal, fit to print whatever a file called its tensors."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from affectlens.html import number, plain

if TYPE_CHECKING:
    import pandas as pd


def rows(frame: "pd.DataFrame", names: Sequence[str] = ()) -> list[str]:
    """Write the named columns of a frame (all by default) as aligned lines."""
    kept = [name for name in names or list(frame.columns) if name in frame]
    cells = [[number(cell) for cell in row] for row in frame[kept].itertuples(index=False)]
    return aligned(kept, cells).splitlines()


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set rows in columns, numbers to the right.

    >>> print(aligned(["role", "rms"], [["gate_proj", "0.1"], ["q", "0.25"]]))
    role        rms
    gate_proj   0.1
    q          0.25
    """
    cells = [[plain(cell) for cell in row] for row in rows]
    grid = [list(header), *cells]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip()

    return "\n".join(line(row) for row in grid)


def _numeric(cell: str) -> bool:
    return not cell or cell[0] in "-+0123456789[" or cell in ("inf", "nan")
