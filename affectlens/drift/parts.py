"""Plan a diff: each site is a strip of rows over all sides, cut into parts of one size.

Where a site is one run of bytes in the same order on every side, its raw bytes are compared; otherwise
its rows are read as numbers. The size of a part does not depend on the number of threads, so sums are
the same to the last bit whatever that number is.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from affectlens.checkpoints import Checkpoint, Pairing
from affectlens.checkpoints.adapters.low_rank import LowRank
from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.tying import VOCABULARY, sharing
from affectlens.checkpoints.vocabulary import Rows, compare_words
from affectlens.errors import TableError, near
from affectlens.sites import Site, Units

DETAILS = ("heads", "neurons", "exact")
PART = 1 << 24  # bytes of a side
_SPREAD = 8  # times as many rows are read at once, if those that are wanted lie among them
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}  # the dtypes whose raw bytes the engines compare


@dataclass(frozen=True)
class Detail:
    """The detail that the user asked for: heads, neurons, and `exact`: no use of factors or hashes."""

    units: frozenset[str] = frozenset()
    exact: bool = False

    @classmethod
    def of(cls, asked: str | Iterable[str] | None, *, exact: bool = False) -> "Detail":
        """Parse `"heads"`, `"neurons"`, `"exact"` or several; raises `TableError` for another word."""
        parts = asked.split(",") if isinstance(asked, str) else (asked or ())
        words = {str(word).strip() for word in parts}
        for word in sorted(words - set(DETAILS)):
            raise TableError(f"no detail {word!r}. Details: {near(word, DETAILS)}")
        return cls(frozenset(word.removesuffix("s") for word in words - {"exact"}), exact or "exact" in words)


@dataclass(frozen=True, eq=False)
class Strip:
    """One site on every side: base, tuned and, where there is one, the control."""

    site: Site
    sides: tuple[Checkpoint, ...]
    rows: int  # compared; fewer than on a side where a vocabulary was resized
    width: int  # elements of a row
    spans: tuple[Span, ...] | None  # of the rows on each side, where raw bytes are compared
    dtype: str
    units: Units | None = None  # heads or neurons, measured one by one
    factors: tuple[LowRank, LowRank | None] | None = None  # of Δ and the control's Δ, used instead of reading
    picked: tuple[Rows, ...] | None = None  # the rows to compare on each side, where their order differs
    unread: bool = False  # both sides are the same bytes on a hub, so they are not read

    def read(self, number: int, *, rows: slice) -> Tensor:
        """Read some of the compared rows of a side."""
        side = self.sides[number]
        if self.picked is None:
            return side.read(self.site, rows)
        wanted = self.picked[number][rows]
        if not len(wanted):
            return side.read(self.site, slice(0, 0))
        first, last = int(wanted.min()), int(wanted.max()) + 1
        if last - first <= _SPREAD * len(wanted):
            return side.read(self.site, slice(first, last))[torch.from_numpy(wanted - first)]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return torch.cat([side.read(self.site, slice(int(run[0]), int(run[-1]) + 1)) for run in runs])

    @property
    def size(self) -> int:
        """The number of elements compared."""
        return self.rows * self.width

    @property
    def bytes(self) -> int:
        """The number of bytes to read, over all sides."""
        if self.unread:
            return 0
        if self.spans is not None:
            sides = self.spans[:1] if self.factors else self.spans
            return sum(span.stop - span.start for span in sides)
        return self.size * 4 * len(self.sides)

    @property
    def place(self) -> tuple[str, int]:
        """The file and offset in base; in this order files are read from front to back."""
        return (self.spans[0].of.name, self.spans[0].start) if self.spans else ("", 0)


@dataclass(frozen=True)
class Part:
    """Some rows of a strip."""

    strip: Strip
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """The number of bytes to read: the strip's, in proportion to the rows."""
        return self.strip.bytes * (self.stop - self.start) // max(self.strip.rows, 1)


def strips(
    pairing: Pairing, control: Checkpoint | None, *, detail: Detail, only: Iterable[Site] | None = None
) -> Iterator[Strip]:
    """Yield a strip for each site that is compared, in the order of sites, or for `only` some of them."""
    alike = (
        control is None
        or bool(control.change)
        or compare_words(pairing.base.store, control.store).rows is None
    )
    for site in pairing.compared if only is None else only:
        sides: tuple[Checkpoint, ...] = pairing.sides(site)
        if control is not None and (alike or site.role not in VOCABULARY):
            beside = control if site in control.storage else sharing(control, site)
            if beside is not None and _comparable(site, sides[0].shape(site), beside.shape(site)):
                sides = (*sides, beside)
        shapes = [side.shape(site) for side in sides]
        if site in pairing.matched:
            picked = (*pairing.matched[site], pairing.matched[site][0])[
                : len(sides)
            ]  # control's are as base's
            rows, width = len(picked[0]), math.prod(shapes[0][1:])
            yield Strip(site, sides, rows, width, None, "", picked=picked)
        else:
            yield _strip(site, sides, min(shapes), detail)


def parts(strip: Strip) -> Iterator[Part]:
    """Cut a strip into parts; one that can't be read by rows stays whole, an empty one has no part."""
    if not strip.size:
        return  # an empty strip may still have rows
    step = max(1, PART // max(strip.width * WIDTHS.get(strip.dtype, 4), 1))
    if strip.spans is None and not all(side.by_rows(strip.site) for side in strip.sides):
        step = max(strip.rows, 1)
    for start in range(0, strip.rows, step):
        yield Part(strip, start, min(start + step, strip.rows))


def _strip(site: Site, sides: tuple[Checkpoint, ...], shape: tuple[int, ...], detail: Detail) -> Strip:
    units = sides[0].units(site) if detail.units and len(shape) == 2 else None
    units = units if units and units.kind in detail.units else None
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    factors = None if detail.exact else _factors(site, sides)
    if factors is not None:
        spans = None if sides[0].at(site).transposed else _spans(site, sides[:1], math.prod(shape))
        return Strip(site, sides, rows, width, spans, sides[0].dtype(site), units, factors)
    spans, dtypes = _spans(site, sides, math.prod(shape)), {side.dtype(site) for side in sides}
    dtype = dtypes.pop() if len(dtypes) == 1 else ""
    turned = {side.at(site).transposed for side in sides} if len(shape) > 1 else {False}
    if not dtype or len(turned) > 1 or (units and turned == {True}):
        spans = None
    unread = spans is not None and not detail.exact and not units and _same_remote(spans)
    if spans is not None and not units:
        rows, width = math.prod(shape), 1  # raw bytes may be cut anywhere
    return Strip(site, sides, rows, width, spans, dtype, units, unread=unread)


def _factors(site: Site, sides: tuple[Checkpoint, ...]) -> tuple[LowRank, LowRank | None] | None:
    """Return the factors of the whole change, where the adapter's base is the base of the diff."""
    base, tuned, *control = sides
    delta = _delta(site, base, tuned)
    if delta is None:
        return None
    if not control or _untouched(site, base, control[0]):
        return delta, None
    other = _delta(site, base, control[0])
    return None if other is None else (delta, other)


def _untouched(site: Site, base: Checkpoint, side: Checkpoint) -> bool:
    """Return whether a side is an adapter over base that leaves the site as it is."""
    return side.change is not None and side.change.base.store is base.store and not side.targeted(site)


def _delta(site: Site, base: Checkpoint, side: Checkpoint) -> LowRank | None:
    found = side.factors.get(site)
    if found is None or found.decomposed or side.change is None or site in base.factors:
        return None
    return found if side.change.base.store is base.store else None


def _comparable(site: Site, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether two sides are comparable: of one shape, or vocabularies of different length."""
    return one == other or (site.role in VOCABULARY and bool(one) and one[1:] == other[1:])


def _same_remote(spans: tuple[Span, ...]) -> bool:
    return spans[0].of.remote and len({span.key for span in spans}) == 1


def _spans(site: Site, sides: tuple[Checkpoint, ...], count: int) -> tuple[Span, ...] | None:
    found = []
    for side in sides:
        span = side.span(site)
        width = WIDTHS.get(side.dtype(site))
        if span is None or width is None or span.stop - span.start < count * width:
            return None
        found.append(span.part(0, count * width))
    return tuple(found)
