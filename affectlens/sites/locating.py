"""From names and shapes to sites, each with the slice of storage it lives in."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from affectlens.errors import CheckpointError
from affectlens.sites.naming import canonical
from affectlens.sites.roles import place
from affectlens.sites.site import Site

Shape = tuple[int, ...]

# Fused projections whose thirds along dim 0 are these roles.
_THIRDS = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
# A role below these parents is the layer's own; below any other (a cross attention) it is labelled.
_OWN = frozenset({"self_attn", "attn", "attention", "mlp", "feed_forward", ""})
_SHARED = frozenset({"norm", "other", "learned_token", "proj", "fc1", "fc2", "conv"})


class Storage(NamedTuple):
    """Where a site lies: a stored tensor, or some rows of it. `shape` is the site's own."""

    tensor: str
    shape: Shape
    rows: slice | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def locate(shapes: Mapping[str, Shape], source: str = "these names") -> dict[Site, Storage]:
    """Find the sites of a checkpoint or model from the names and shapes of its tensors.

    Every element of every tensor belongs to exactly one site: a fused tensor is split exactly, or
    left whole. Raises `CheckpointError` when two tensors claim one site.
    """
    names = canonical(shapes)
    modules = frozenset(_split(name)[0] for name in names.values())
    sites: dict[Site, Storage] = {}
    for tensor, shape in shapes.items():
        for site, storage in _sites(tensor, names[tensor], shape, modules):
            if site in sites:
                reason = f"names the same parameter as {sites[site].tensor!r} ({site})"
                raise CheckpointError(source, reason, key=tensor)
            sites[site] = storage
    return dict(sorted(sites.items(), key=lambda item: item[0]))


def _sites(tensor: str, name: str, shape: Shape, modules: frozenset[str]) -> list[tuple[Site, Storage]]:
    module, param = _split(name)
    where = place(module, modules)
    parent = where.local.rpartition(".")[0]
    if where.layer is None or where.role in _SHARED:
        label = "" if where.role in ("embed_tokens", "lm_head") else where.local
    else:
        label = "" if parent in _OWN else parent
    label = label.removeprefix("model.").removeprefix("language_model.")
    if param in ("in_proj_weight", "in_proj_bias"):
        param = param.removeprefix("in_proj_")

    def site(role: str) -> Site:
        return Site(where.tower, role, layer=where.layer, param=param, label=label, parameter=name)

    roles = _THIRDS.get(where.role, ())
    if not roles or not shape or shape[0] % len(roles):
        return [(site(where.role), Storage(tensor, shape))]
    count = shape[0] // len(roles)
    starts = range(0, shape[0], count)
    return [
        (site(role), Storage(tensor, (count, *shape[1:]), slice(start, start + count)))
        for role, start in zip(roles, starts, strict=True)
    ]


def _split(name: str) -> tuple[str, str]:
    module, _, param = name.rpartition(".")
    if param in ("weight", "bias"):
        return module, param
    if param in ("in_proj_weight", "in_proj_bias"):
        return f"{module}.in_proj", param
    return name, "param"
