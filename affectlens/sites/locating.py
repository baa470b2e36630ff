"""From names and shapes to sites, each with the slice of storage it lives in."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from affectlens.errors import CheckpointError
from affectlens.sites.naming import canonical
from affectlens.sites.roles import Place, place
from affectlens.sites.site import Site

Shape = tuple[int, ...]

# Fused projections whose thirds along dim 0 are these roles.
_THIRDS = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
# A role below these parents is the layer's own; below any other (a cross attention) it is labelled.
_OWN = frozenset({"self_attn", "attn", "attention", "mlp", "feed_forward", ""})
_EXPERT = re.compile(r"(?:^|(?<=\.))experts\.(\d+)\.")
_STACKS = ("encoder", "decoder")
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
    places = {module: place(module, modules) for module in modules}
    stacked = _stacked(places)
    sites: dict[Site, Storage] = {}
    # In the order of names: what becomes of a clash must not depend on how a file happens to be sorted.
    for tensor in sorted(shapes, key=lambda tensor: (names[tensor], tensor)):
        name = names[tensor]
        where = places[_split(name)[0]]
        stack = _stack(name) if where.tower in stacked else None
        for site, storage in _sites(tensor, shapes[tensor], _site(name, where, stack)):
            found = site
            if site in sites and names[sites[site].tensor] != name:
                found = replace(site, label=name)  # a structure this table does not know: keep them apart
            if found in sites:
                reason = f"names the same parameter as {sites[found].tensor!r} ({found})"
                raise CheckpointError(source, reason, key=tensor)
            sites[found] = storage
    return dict(sorted(sites.items(), key=lambda item: item[0]))


def _stack(module: str) -> str | None:
    return next((part for part in module.split(".") if part in _STACKS), None)


def _stacked(places: Mapping[str, Place]) -> frozenset[str]:
    """The towers with both an encoder and a decoder, where layer numbers alone would not be unique."""
    stacks: dict[str, set[str]] = {}
    for module, where in places.items():
        if stack := _stack(module):
            stacks.setdefault(where.tower, set()).add(stack)
    return frozenset(tower for tower, found in stacks.items() if len(found) > 1)


def _site(name: str, where: Place, stack: str | None) -> Site:
    expert = _EXPERT.search(where.local)
    parent = _EXPERT.sub("", where.local.rpartition(".")[0] + ".").removesuffix(".")
    if where.layer is None or where.role in _SHARED:
        label = "" if where.role in ("embed_tokens", "lm_head") else where.local
    else:
        label = "" if parent in _OWN else parent
    label = label.removeprefix("model.").removeprefix("language_model.")
    param = _split(name)[1].removeprefix("in_proj_")
    number = int(expert[1]) if expert else None
    return Site(where.tower, where.role, where.layer, stack, param, number, label, name)


def _sites(tensor: str, shape: Shape, whole: Site) -> list[tuple[Site, Storage]]:
    roles = _THIRDS.get(whole.role, ())
    if not roles or not shape or shape[0] % len(roles):
        return [(whole, Storage(tensor, shape))]
    count = shape[0] // len(roles)
    starts = range(0, shape[0], count)
    return [
        (replace(whole, role=role), Storage(tensor, (count, *shape[1:]), slice(start, start + count)))
        for role, start in zip(roles, starts, strict=True)
    ]


def _split(name: str) -> tuple[str, str]:
    module, _, param = name.rpartition(".")
    if param in ("weight", "bias"):
        return module, param
    if param in ("in_proj_weight", "in_proj_bias"):
        return f"{module}.in_proj", param
    return name, "param"
