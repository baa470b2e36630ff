"""What lies below a site: the neurons of an MLP, the heads of an attention."""

from dataclasses import dataclass

from affectlens.sites.site import Site
from affectlens.sites.storage import Cut, Shape

# Which dimension of the canonical (out, in) matrix counts the units.
_NEURONS = {"gate_proj": 0, "up_proj": 0, "fc1": 0, "down_proj": 1, "fc2": 1}
_HEADS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}


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
