"""Where a site lies: a stored tensor, or an expert, a slice or the transpose of one."""

import math
from typing import NamedTuple

Shape = tuple[int, ...]


class Cut(NamedTuple):
    """Indices along one dimension: of every `period`, those from `start` to `stop`."""

    dim: int
    start: int
    stop: int
    period: int


class Storage(NamedTuple):
    """A site's place in a stored tensor; `shape` is the site's own, a matrix being (out, in)."""

    tensor: str
    shape: Shape
    expert: int | None = None  # an index along the first dimension, which the site does not have
    cut: Cut | None = None  # along a dimension of the stored tensor
    transposed: bool = False  # stored (in, out)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Fused(NamedTuple):
    """How a fused tensor is put together along `dim`: every `period` indices hold these slices."""

    dim: int
    size: int
    layout: str  # "concat", "per_head" or "interleaved"
    period: int
    slices: tuple[tuple[str, int, int], ...]  # role, start, stop

    def cuts(self) -> tuple[tuple[str, Cut], ...]:
        """The role and indices of each slice."""
        return tuple((role, Cut(self.dim, start, stop, self.period)) for role, start, stop in self.slices)


def stored(tensor: str, shape: Shape, *, expert: int | None, cut: Cut | None, transposed: bool) -> Storage:
    """Work out the shape of what lies there."""
    own = list(shape)
    if cut:
        own[cut.dim] = shape[cut.dim] // cut.period * (cut.stop - cut.start)
    if expert is not None:
        own = own[1:]
    if transposed:
        own[-2:] = own[:-3:-1]
    return Storage(tensor, tuple(own), expert, cut, transposed)
