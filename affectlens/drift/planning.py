"""What is read together: each site as a strip of rows over both sides, cut into parts to be measured.

Where a site is one run of bytes in the same order on every side, its bytes are compared as they lie;
otherwise rows are read as numbers. Parts have a size of their own, whatever the number of threads, so
that sums come out the same to the last bit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from affectlens.checkpoints import Checkpoint, Pairing
from affectlens.checkpoints.bytes import Span
from affectlens.sites import Site, Units

PART = 1 << 24  # bytes of a side
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}  # the dtypes that are compared as they lie


@dataclass(frozen=True, eq=False)
class Strip:
    """One site on every side: base, tuned and, where there is one, the control."""

    site: Site
    sides: tuple[Checkpoint, ...]
    rows: int  # that are compared; fewer than a side has where a vocabulary was resized
    width: int  # elements of a row
    spans: tuple[Span, ...] | None  # of the rows on each side, where they are compared as they lie
    dtype: str
    units: Units | None  # to be measured one by one

    @property
    def size(self) -> int:
        """Elements that are compared."""
        return self.rows * self.width

    @property
    def bytes(self) -> int:
        """Bytes to be read of all sides."""
        if self.spans is not None:
            return sum(span.stop - span.start for span in self.spans)
        return self.size * 4 * len(self.sides)

    @property
    def place(self) -> tuple[str, int]:
        """Where base has it, so that files are read from front to back."""
        return (self.spans[0].of.name, self.spans[0].start) if self.spans else ("", 0)


@dataclass(frozen=True)
class Part:
    """Some rows of a strip."""

    strip: Strip
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Bytes to be read, in proportion."""
        return self.strip.bytes * (self.stop - self.start) // max(self.strip.rows, 1)


def strips(pairing: Pairing, control: Checkpoint | None, *, detail: str | None) -> Iterator[Strip]:
    """A strip for each site that both sides have, in the order of sites."""
    for site in pairing.compared:
        shapes = [side.shape(site) for side in (pairing.base, pairing.tuned)]
        sides: tuple[Checkpoint, ...] = (pairing.base, pairing.tuned)
        if control is not None and site in control.storage and control.shape(site) == shapes[0]:
            sides = (*sides, control)
        yield _strip(site, sides, min(shapes), detail)


def parts(strip: Strip) -> Iterator[Part]:
    """Cut a strip; one that can't be read by rows stays whole."""
    step = max(1, PART // (strip.width * WIDTHS.get(strip.dtype, 4)))
    if strip.spans is None and not all(side.by_rows(strip.site) for side in strip.sides):
        step = max(strip.rows, 1)
    for start in range(0, strip.rows, step):
        yield Part(strip, start, min(start + step, strip.rows))


def _strip(site: Site, sides: tuple[Checkpoint, ...], shape: tuple[int, ...], detail: str | None) -> Strip:
    units = sides[0].units(site) if detail and len(shape) == 2 else None
    units = units if units and f"{units.kind}s" == detail else None
    spans, dtypes = _spans(site, sides, math.prod(shape)), {side.dtype(site) for side in sides}
    dtype = dtypes.pop() if len(dtypes) == 1 else ""
    turned = {side.at(site).transposed for side in sides} if len(shape) > 1 else {False}
    if spans is None or dtype not in WIDTHS or len(turned) > 1 or (units and turned == {True}):
        spans = None
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if spans is not None and not units:
        rows, width = math.prod(shape), 1  # any cut will do
    return Strip(site, sides, rows, width, spans, dtype, units)


def _spans(site: Site, sides: tuple[Checkpoint, ...], count: int) -> tuple[Span, ...] | None:
    found = []
    for side in sides:
        span = side.span(site)
        width = WIDTHS.get(side.dtype(site))
        if span is None or width is None or span.stop - span.start < count * width:
            return None
        found.append(span.part(0, count * width))
    return tuple(found)
