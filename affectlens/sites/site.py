"""The site: one canonical, unfused parameter, the key of everything that follows."""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

Shape = tuple[int, ...]
# Which dimension of the canonical (out, in) matrix counts the units.
_NEURONS = {"gate_proj": 0, "up_proj": 0, "fc1": 0, "down_proj": 1, "fc2": 1}
_HEADS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}


@dataclass(frozen=True)
class Site:
    """Name a parameter by what it does and where, not by how a file happens to store it.

    Two layouts of one model give equal sites: `parameter`, the canonical name as transformers
    names it in memory, is shown but takes no part in the comparison. `head` and `neuron` go below the
    parameter: one head of q, k, v or o, one unit of an MLP.

    >>> Site("language", "gate_proj", layer=12)
    language.12.gate_proj
    >>> Site("language", "q_proj", layer=12).at(head=3)
    language.12.q_proj[head 3]
    """

    tower: str
    role: str
    layer: int | None = None
    stack: str | None = None
    param: str = "weight"
    expert: int | None = None
    label: str = ""  # tells apart the sites of a layer that share a role, e.g. its norms
    parameter: str = field(default="", compare=False)
    head: int | None = None
    neuron: int | None = None

    def at(self, *, head: int | None = None, neuron: int | None = None) -> "Site":
        """The head or neuron of this number; with neither, the whole parameter."""
        if head is not None and neuron is not None:
            raise ValueError("a head or a neuron, not both: no matrix has both")
        if head is neuron is None and self.head is self.neuron is None:
            return self
        return replace(self, head=head, neuron=neuron)

    def __repr__(self) -> str:
        layer = None if self.layer is None else str(self.layer)
        expert = None if self.expert is None else f"experts.{self.expert}"
        role = f"{self.role}({self.label})" if self.label else self.role
        param = None if self.param == "weight" else self.param
        name = ".".join(p for p in (self.tower, self.stack, layer, expert, role, param) if p)
        below = {"head": self.head, "neuron": self.neuron}
        return name + "".join(f"[{kind} {n}]" for kind, n in below.items() if n is not None)

    def __lt__(self, other: "Site") -> bool:
        return _order(self) < _order(other)


def _order(site: Site) -> tuple[object, ...]:
    layer, expert, head, neuron = (
        -1 if n is None else n for n in (site.layer, site.expert, site.head, site.neuron)
    )
    return site.tower, site.stack or "", layer, expert, site.role, site.label, site.param, head, neuron


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


@dataclass(frozen=True)
class Units:
    """Equal parts of a site along one dimension; `shared` query heads use one head of k and v."""

    kind: str  # "neuron" or "head"
    count: int
    dim: int
    size: int  # indices of each
    shared: int = 1

    def cut(self, number: int) -> Cut:
        """The indices of one unit."""
        start = number * self.size
        return Cut(self.dim, start, start + self.size)


def units(site: Site, shape: Shape, *, heads: int | None, kv_heads: int | None) -> Units | None:
    """Say what a site of this shape is made of; None for one that has no such parts.

    `heads` and `kv_heads` are those of the site's tower. The bias of a `down_proj` or `o_proj` belongs
    to no unit.
    """
    if site.role in _NEURONS:
        dim = _NEURONS[site.role]
        return Units("neuron", shape[dim], dim, 1) if dim < len(shape) else None
    if site.role not in _HEADS or not heads:
        return None
    dim = _HEADS[site.role]
    grouped = site.role in ("k_proj", "v_proj") and kv_heads
    count = kv_heads if grouped and kv_heads else heads
    if dim >= len(shape) or shape[dim] % count:
        return None
    return Units("head", count, dim, shape[dim] // count, heads // count)
