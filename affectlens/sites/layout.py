"""Describe each stored tensor by its name, shape, siblings and config: place, role, slices, experts."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from affectlens.sites.fused import Setting, fused, glu_in_fc1
from affectlens.sites.names import INDEX, canonical, stacked
from affectlens.sites.placement import WRAPPED, Placement, places
from affectlens.sites.site import Fused, Shape
from affectlens.sites.tower_configs import model_type, sections
from affectlens.sites.towers import TOWERS

_EXPERT = re.compile(rf"(?:^|\.)experts\.(?:expert_)?({INDEX})(?=\.)")
_END_TO_END = re.compile(r"(?:^|\.)experts\.mlp\.")  # DBRX concatenates its experts in one matrix
_SHARED = re.compile(r"(?:^|\.)shared_(?:experts?|mlp)(?=\.)")
_MOST_EXPERTS = 4096  # a header of a few bytes may claim any number, and each becomes a site
# BERT and its kin put the matrices of one block into these submodules.
_HALVES = re.compile(r"(?<=\w)\.(?:self|attention|output|intermediate)$")
_WHOLE = {
    "gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj", "up_proj"), "down_proj": ("down_proj",),
    "fc1": ("up_proj",), "fc2": ("down_proj",),
}  # fmt: skip
_IN_EXPERT = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2")

_Block = tuple[str, str]  # what a parameter has in common with its siblings: tower, and path of the parent


class Laid(NamedTuple):
    """A stored tensor and everything that is known about it."""

    name: str  # canonical
    memory: str  # the live model's parameter, which may stack all experts if the file has them one by one
    shape: Shape
    place: Placement
    fused: Fused | None
    expert: int | str | None  # its number, or "stacked" if the first dimension counts experts
    block: str | None  # "expert", "shared_expert" or None
    transposed: bool

    @property
    def param(self) -> str:
        """`weight`, `bias` or `param`; stacked experts are bare parameters, so the name tells."""
        if self.expert == "stacked" and self.place.param == "param":
            return "bias" if self.name.endswith("bias") else "weight"
        return self.place.param


def lay_out(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any] | None = None,
    *,
    context: Mapping[str, Shape] | None = None,
) -> dict[str, Laid]:
    """Describe each tensor; `context` holds the tensors of the same model that are stored elsewhere."""
    config = config or {}
    names = canonical([*shapes, *(context or {})], config)
    known = {names[tensor]: shape for tensor, shape in {**(context or {}), **shapes}.items()}
    settings = sections(config, TOWERS)
    plain = places(known, model_type(config))
    blocks = {name: _block(place) for name, place in plain.items()}
    where = _with_glu(plain, known, settings=settings, blocks=blocks)
    beside = _beside(where, known, blocks)
    conv1d = _conv1d(where, known)
    laid = {}
    for tensor, shape in shapes.items():
        name = names[tensor]
        place = where[name]
        near = beside[blocks[name]]
        tower = place.position.tower
        kind = str(settings[tower]["model_type"])
        setting = Setting(kind, tower, place.module.removesuffix("_bias"), tensor, near, settings[tower])
        parts = fused(place.role, shape, setting=setting)
        expert, block = _expert(place, shape)
        if expert == "stacked" and parts and parts.dim == 0:
            parts = None  # the first dimension counts experts, so it can't hold fused parts
        # DBRX concatenates its experts, and transposes the last matrix of each.
        turned = (
            place.module.endswith("experts.mlp.w2")
            or (place.module in conv1d and len(shape) == 2)
            or _experts_transposed(place, shape, near)
        )
        memory = _stacked(name, place.role, kind) if isinstance(expert, int) else name
        laid[tensor] = Laid(name, memory, shape, place, parts, expert, block, turned)
    return laid


def record(tensor: str, laid: Laid, *, dtype: str) -> dict[str, Any]:
    """Describe a tensor for JSON.

    `fused` gives its layout: in every `period` indices along `dim` (in all `size` of them if the layout is
    "concat"), `slices` lists the roles from `start` to `stop`. `expert` is a number, or "stacked" if the
    first dimension counts experts.
    """
    at = laid.place.position
    return {
        "disk": tensor,
        "mem": [laid.memory],
        "tower": at.tower,
        "stack": at.stack,
        "layer": at.layer,
        "role": laid.place.role,
        "param": laid.param,
        "fused": _fused(laid),
        "expert": laid.expert,
        "block": laid.block,
        "transposed": "conv1d(in,out)" if laid.transposed and laid.block != "expert" else None,
        "shape": list(laid.shape),
        "dtype": dtype,
    }


def _stacked(name: str, role: str, model_type: str) -> str:
    """Return the live parameter that holds a file's expert if transformers stacks the experts."""
    known = stacked(model_type)
    for whole in _WHOLE.get(role, ()):
        if whole in known:
            return _EXPERT.split(name)[0] + f".experts.{whole}"
    return name


def _with_glu(
    where: Mapping[str, Placement],
    shapes: Mapping[str, Shape],
    *,
    settings: Mapping[str, Mapping[str, Any]],
    blocks: Mapping[str, _Block],
) -> Mapping[str, Placement]:
    """Recognise a gate in the first matrix of an MLP with plain names: it is twice as wide as needed."""
    last = {blocks[name]: shapes[name] for name, p in where.items() if p.role == "fc2" and p.param != "bias"}
    gated = set()
    for name, place in where.items():
        if place.role != "fc1" or place.param == "bias":
            continue
        first, second = shapes[name], last.get(blocks[name], ())
        if len(first) == len(second) == 2 and first[0] == 2 * second[1]:
            kind = str(settings[place.position.tower]["model_type"])
            if glu_in_fc1(place.module, kind):
                gated.add(blocks[name])
    new = {"fc1": "gate_up_proj", "fc2": "down_proj"}
    return {
        name: place._replace(role=new.get(place.role, place.role)) if blocks[name] in gated else place
        for name, place in where.items()
    }


def _block(place: Placement) -> _Block:
    """Return the block of a parameter."""
    parent = WRAPPED.sub("", place.module).rpartition(".")[0]
    return place.position.tower, _HALVES.sub("", parent)


def _beside(
    where: Mapping[str, Placement], shapes: Mapping[str, Shape], blocks: Mapping[str, _Block]
) -> Mapping[_Block, Mapping[str, Shape]]:
    found: dict[_Block, dict[str, Shape]] = defaultdict(dict)
    for name, place in where.items():
        bias = place.param == "bias" or name.endswith("_bias")
        found[blocks[name]].setdefault(f"{place.role}.bias" if bias else place.role, shapes[name])
    return found


def _conv1d(where: Mapping[str, Placement], shapes: Mapping[str, Shape]) -> frozenset[str]:
    """Find the modules stored as (in, out), like GPT-2's Conv1D: the bias is as long as dimension 1."""
    biases = {p.module: shapes[n] for n, p in where.items() if p.param == "bias"}
    turned, alike = set(), {}
    for name, place in where.items():
        shape, leaf = shapes[name], place.module.rpartition(".")[2]
        if place.param == "weight" and len(shape) == 2:
            if shape[0] != shape[1] and biases.get(place.module) == shape[1:]:
                turned.add(place.module)
            if leaf.startswith("c_") or leaf == "q_attn":
                alike[place.module] = place.position.tower
    # The shape of a square matrix does not tell; the other matrices of its tower do.
    towers = {alike[module] for module in turned if module in alike}
    return frozenset(turned | {module for module, tower in alike.items() if tower in towers})


def _expert(place: Placement, shape: Shape) -> tuple[int | str | None, str | None]:
    local = place.position.local
    if _SHARED.search(local):
        return None, "shared_expert"
    if match := _EXPERT.search(local):
        return int(match[1]), "expert"
    if place.role in _IN_EXPERT:
        bias = place.param == "bias" or place.module.endswith("_bias")
        stack = len(shape) == (2 if bias else 3)
        if shape[0] <= _MOST_EXPERTS if stack else _END_TO_END.search(local):
            return "stacked", "expert"
    return None, None


def _experts_transposed(place: Placement, shape: Shape, near: Mapping[str, Shape]) -> bool:
    both, down = near.get("gate_up_proj", ()), near.get("down_proj", ())
    if len(shape) != 3 or place.role not in ("gate_up_proj", "down_proj") or (len(both), len(down)) != (3, 3):
        return False
    return both[-2] != 2 * down[-1] and both[-1] == 2 * down[-2]


def _fused(laid: Laid) -> dict[str, Any] | None:
    if laid.fused is None:
        return None
    dim, size, layout, period, slices = laid.fused
    parts = [{"role": role, "start": start, "stop": stop} for role, start, stop in slices]
    periodic = {} if layout == "concat" else {"period": period}
    return {"dim": dim, "size": size, "layout": layout, **periodic, "slices": parts}
