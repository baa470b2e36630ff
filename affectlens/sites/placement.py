"""Place each parameter by its canonical name and shape: tower, stack, layer, role."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from affectlens.sites.module import Module
from affectlens.sites.names import is_name
from affectlens.sites.roles import role
from affectlens.sites.site import Shape
from affectlens.sites.towers import Position, positions

# Weight norm stores a weight as two factors.
_FACTORS = re.compile(r"\.(?:parametrizations\.weight\.original\d|weight_[gv])$")
# Infixes between a module's name and its weight: clipped linears, the halves of a gated MLP.
WRAPPED = re.compile(r"(?<=[a-z0-9])\.(?:linear)$|(?<=fc1)\.proj$|\.w_in(?=\.w_[01]$)")
_TABLE_OF_TOKENS = re.compile(
    r"(?:embed_tokens|wte|word_embeddings?|tok(?:en)?_embeddings?|embed_in|shared|embed)$"
)
_LAYER = re.compile(r"\.\d+\.$")
# Siblings. A longer list is not a block (a layer has at most 512 experts), and comparing each name with all
# the others would take hours.
_MOST = 1000


class Placement(NamedTuple):
    """The place and the role of a parameter."""

    position: Position
    role: str
    param: str  # `weight`, `bias`, or `param` for a bare parameter
    module: str


def places(shapes: Mapping[str, Shape], model_type: str = "") -> dict[str, Placement]:
    """Place every parameter, given canonical names."""
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
    # Strings that are too long for a name still need a site, so that every element is counted.
    for name in shapes.keys() - split.keys():
        placed[name] = Placement(Position("language", None, None, name), "other", "param", name)
    return placed


def _split(name: str) -> tuple[str, str]:
    name = _FACTORS.sub(".weight", name)
    module, _, param = name.rpartition(".")
    if param in ("weight", "bias") and module:
        return module, param
    # torch's MultiheadAttention keeps its packed matrix as a bare parameter.
    for kind in ("weight", "bias"):
        if param == f"in_proj_{kind}":
            return f"{module}.in_proj", kind
    return name, "param"


class Siblings:
    """The names beside each module, in any layer of its list.

    A layer that is split over two shards shows only some of its names in each. Shapes are those of the
    module's own layer, since layers may differ in width.
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
        """Return the names beside a module, with the shapes of their weights if its layer has them."""
        above, parent = module.removesuffix(at.local), WRAPPED.sub("", at.local).rpartition(".")[0]
        if (above, parent) not in self._known:
            names = self._names[_LAYER.sub("", above), parent]
            self._known[above, parent] = names | self._shapes[above + parent] if len(names) <= _MOST else {}
        return self._known[above, parent]
