"""From canonical names and shapes to places: tower, stack, layer, role."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from affectlens.sites.module import Module
from affectlens.sites.names import is_name
from affectlens.sites.roles import role
from affectlens.sites.towers import Position, positions

Shape = tuple[int, ...]
# A parametrised weight (weight norm) is stored as its factors; a packed attention as in_proj_weight.
_FACTORS = re.compile(r"\.(?:parametrizations\.weight\.original\d|weight_[gv])$")
# What stands between a module's name and its weight: clipped linears, gated halves of their own.
WRAPPED = re.compile(r"(?<=[a-z0-9])\.(?:linear)$|(?<=fc1)\.proj$|\.w_in(?=\.w_[01]$)")
_TABLE_OF_TOKENS = re.compile(
    r"(?:embed_tokens|wte|word_embeddings?|tok(?:en)?_embeddings?|embed_in|shared|embed)$"
)
_LAYER = re.compile(r"\.\d+\.$")
_MOST = 1000  # names beside each other; the experts of a layer are 512 at most
_MOST_SIBLINGS = 256  # a longer list is no block, and to ask each of all the others would take hours


class Placement(NamedTuple):
    """Where a parameter sits and what it does."""

    position: Position
    role: str
    param: str  # `weight`, `bias`, or `param` for one that is neither
    module: str


def places(shapes: Mapping[str, Shape], model_type: str = "") -> dict[str, Placement]:
    """Placement every parameter, given canonical names."""
    split = {name: _split(name) for name in shapes if is_name(name)}
    params: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, (module, param) in split.items():
        params[module].setdefault(param, shapes[name])
    weights = {module: found.get("weight", ()) for module, found in params.items()}
    where = positions(weights, model_type)
    beside = Siblings(where, weights)
    tables = {shape[0] for module, shape in weights.items() if shape and _TABLE_OF_TOKENS.search(module)}
    roles: dict[str, str] = {}
    for module, found in params.items():
        at = where[module]
        local = WRAPPED.sub("", at.local)
        near = beside.of(module, at)
        roles[module] = role(Module(at.tower, at.layer is not None, local, found, near, frozenset(tables)))
    placed = {name: Placement(where[m], roles[m], param, m) for name, (m, param) in split.items()}
    for name in shapes.keys() - split.keys():
        placed[name] = Placement(Position("language", None, None, name), "other", "param", name)
    return placed


def _split(name: str) -> tuple[str, str]:
    name = _FACTORS.sub(".weight", name)
    module, _, param = name.rpartition(".")
    if param in ("weight", "bias") and module:
        return module, param
    for kind in ("weight", "bias"):
        if param == f"in_proj_{kind}":
            return f"{module}.in_proj", kind
    return name, "param"


class Siblings:
    """The names beside each module, over all layers of its list: one shard of a split layer must not mislead.

    Shapes are those of the module's own layer, since layers may differ in width. A thousand names side by
    side are a list, and say nothing of each other.
    """

    def __init__(self, where: Mapping[str, Position], weights: Mapping[str, Shape]) -> None:
        self._names: dict[tuple[str, str], dict[str, Shape]] = defaultdict(dict)
        self._shapes: dict[str, dict[str, Shape]] = defaultdict(dict)
        self._known: dict[tuple[str, str], Mapping[str, Shape]] = {}
        for module, at in where.items():
            local, shape = WRAPPED.sub("", at.local), weights[module]
            above = module.removesuffix(at.local)
            while local:
                parent, _, leaf = local.rpartition(".")
                self._names[_LAYER.sub("", above), parent][leaf] = ()
                self._shapes[above + parent].setdefault(leaf, shape)
                local, shape = parent, ()

    def of(self, module: str, at: Position) -> Mapping[str, Shape]:
        """The names beside a module, with the shapes of their weights where its layer has them."""
        above, parent = module.removesuffix(at.local), WRAPPED.sub("", at.local).rpartition(".")[0]
        if (above, parent) not in self._known:
            names = self._names[_LAYER.sub("", above), parent]
            self._known[above, parent] = names | self._shapes[above + parent] if len(names) <= _MOST else {}
        return self._known[above, parent]
