"""From canonical names and shapes to places: tower, stack, layer, role."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from affectlens.sites.roles import Module, role
from affectlens.sites.towers import Position, positions

Shape = tuple[int, ...]

# A parametrised weight (weight norm) is stored as its factors; a packed attention as in_proj_weight.
_FACTORS = re.compile(r"\.(?:parametrizations\.weight\.original\d|weight_[gv])$")
# Wrappers between a module's name and its weight: clipped linears, adapters' base layers.
_WRAPPED = re.compile(r"(?<=[a-z0-9])\.(?:linear|base_layer)$")


class Place(NamedTuple):
    """Where a parameter sits and what it does."""

    position: Position
    role: str
    param: str  # `weight`, `bias`, or `param` for one that is neither
    module: str


def places(shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """Place every parameter, given canonical names."""
    split = {name: _split(name) for name in shapes}
    params: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, (module, param) in split.items():
        params[module].setdefault(param, shapes[name])
    where = positions({module: found.get("weight", ()) for module, found in params.items()})
    beside = _siblings(where)
    roles: dict[str, str] = {}
    for module, found in params.items():
        at = where[module]
        local = _WRAPPED.sub("", at.local)
        roles[module] = role(Module(at.tower, at.layer is not None, local, found, beside[_family(at, local)]))
    return {
        name: Place(where[module], roles[module], param, module) for name, (module, param) in split.items()
    }


def _split(name: str) -> tuple[str, str]:
    name = _FACTORS.sub(".weight", name)
    module, _, param = name.rpartition(".")
    if param in ("weight", "bias") and module:
        return module, param
    for kind in ("weight", "bias"):
        if param == f"in_proj_{kind}":
            return f"{module}.in_proj", kind
    return name, "param"


def _family(at: Position, local: str) -> tuple[str, bool, str]:
    return at.tower, at.layer is None, local.rpartition(".")[0]


def _siblings(where: Mapping[str, Position]) -> Mapping[tuple[str, bool, str], frozenset[str]]:
    """The names beside each module over all layers, so that one file of a split layer does not mislead."""
    found: dict[tuple[str, bool, str], set[str]] = defaultdict(set)
    for at in where.values():
        local = _WRAPPED.sub("", at.local)
        while local:
            parent, _, leaf = local.rpartition(".")
            found[at.tower, at.layer is None, parent].add(leaf)
            local = parent
    return defaultdict(frozenset, {key: frozenset(names) for key, names in found.items()})
