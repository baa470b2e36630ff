"""Where a site lies: a stored tensor, or an expert, a slice or the transpose of one."""

import math
from typing import NamedTuple

Shape = tuple[int, ...]


class Cut(NamedTuple):
    """Indices along one dimension, from `start` to `stop`: once, or of every `period`."""

    dim: int
    start: int
    stop: int
    period: int | None = None


class Storage(NamedTuple):
    """A site's place in a stored tensor; `shape` is the site's own, a matrix being (out, in)."""

    tensor: str
    shape: Shape
    expert: int | None = None  # an index along the first dimension, which the site does not have
    cut: Cut | None = None  # along a dimension of the stored tensor
    transposed: bool = False  # stored (in, out)
    unit: Cut | None = None  # a head or neuron, along a dimension of the site's own matrix

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def of(self, unit: Cut) -> "Storage":
        """One of the units that the site is made of."""
        shape = list(self.shape)
        shape[unit.dim] = unit.stop - unit.start
        return self._replace(shape=tuple(shape), unit=unit)


class Fused(NamedTuple):
    """How a fused tensor is put together along `dim`: every `period` indices hold these slices."""

    dim: int
    size: int
    layout: str  # "concat", "per_head" or "interleaved"
    period: int
    slices: tuple[tuple[str, int, int], ...]  # role, start, stop

    def cuts(self) -> tuple[tuple[str, Cut], ...]:
        """The role and indices of each slice."""
        period = None if self.period == self.size else self.period
        return tuple((role, Cut(self.dim, start, stop, period)) for role, start, stop in self.slices)


def stored(tensor: str, shape: Shape, *, expert: int | None, cut: Cut | None, transposed: bool) -> Storage:
    """Work out the shape of what lies there."""
    own = list(shape)
    if cut:
        times = shape[cut.dim] // cut.period if cut.period else 1
        own[cut.dim] = times * (cut.stop - cut.start)
    if expert is not None:
        own = own[1:]
    if transposed:
        own[-2:] = own[:-3:-1]
    return Storage(tensor, tuple(own), expert, cut, transposed)
