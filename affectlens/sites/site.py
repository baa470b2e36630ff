"""The site: one canonical, unfused parameter; the storage of a site, and the units it consists of."""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

Shape = tuple[int, ...]
# The dimension of the canonical (out, in) matrix along which units are counted.
_NEURONS = {"gate_proj": 0, "up_proj": 0, "fc1": 0, "down_proj": 1, "fc2": 1}
_HEADS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}


@dataclass(frozen=True)
class Site:
    """A parameter, identified by its role and its place in the model, not by how a file stores it.

    Two layouts of one model give equal sites: `parameter`, the name that transformers uses in memory, is
    not compared. `head` and `neuron` select a part of the parameter: a head of q, k, v or o, a unit of an
    MLP.

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
    label: str = ""  # distinguishes the sites of a layer that share a role, e.g. its norms
    parameter: str = field(default="", compare=False)
    head: int | None = None
    neuron: int | None = None

    def at(self, *, head: int | None = None, neuron: int | None = None) -> "Site":
        """Select a head or a neuron by its number; without either, the whole parameter.

        Raises `ValueError` for both.
        """
        if head is not None and neuron is not None:
            raise ValueError(f"give head={head} or neuron={neuron}: no matrix has both")
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
    """Indices along one dimension, from `start` to `stop`: once, or in every `period` indices."""

    dim: int
    start: int
    stop: int
    period: int | None = None


class Storage(NamedTuple):
    """The part of a stored tensor that holds a site; `shape` is that of the site, (out, in) for a matrix."""

    tensor: str
    shape: Shape
    expert: int | None = None  # an index along the first dimension of the tensor, which the site lacks
    cut: Cut | None = None  # along a dimension of the tensor
    transposed: bool = False  # stored as (in, out)
    unit: Cut | None = None  # a head or neuron, along a dimension of the site's own matrix

    @property
    def size(self) -> int:
        """The number of elements of the site."""
        return math.prod(self.shape)

    def of(self, unit: Cut) -> "Storage":
        """Select one head or neuron of the site."""
        shape = list(self.shape)
        shape[unit.dim] = unit.stop - unit.start
        return self._replace(shape=tuple(shape), unit=unit)


class Fused(NamedTuple):
    """The layout of a fused tensor along `dim`: every `period` indices hold these slices."""

    dim: int
    size: int
    layout: str  # "concat", "per_head" or "interleaved"
    period: int
    slices: tuple[tuple[str, int, int], ...]  # role, start, stop

    def cuts(self) -> tuple[tuple[str, Cut], ...]:
        """Return the role and the indices of each slice."""
        period = None if self.period == self.size else self.period
        return tuple((role, Cut(self.dim, start, stop, period)) for role, start, stop in self.slices)


def stored(tensor: str, shape: Shape, *, expert: int | None, cut: Cut | None, transposed: bool) -> Storage:
    """Make the storage of a site, and work out the site's shape from the tensor's."""
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
    """Equal parts of a site along one dimension; `shared` query heads use the same head of k and v."""

    kind: str  # "neuron" or "head"
    count: int
    dim: int
    size: int  # indices of each
    shared: int = 1

    def cut(self, number: int) -> Cut:
        """Return the indices of one unit."""
        start = number * self.size
        return Cut(self.dim, start, start + self.size)


def units(site: Site, shape: Shape, *, heads: int | None, kv_heads: int | None) -> Units | None:
    """Return the heads or neurons that a site of this shape consists of; None if it has neither.

    `heads` and `kv_heads` are the numbers of the site's tower. The bias of a `down_proj` or `o_proj` has no
    units: it is added after their sum.
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
