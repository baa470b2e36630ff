"""Places: where in a live model the activations of a point pass by.

    Point (site, kind) ──▶ the module, its input or output, and which features of the last dimension

A site knows its place in storage: the slice of a fused matrix that it is has the same slice of the outputs.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import NamedTuple

from torch import nn

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, NoSuchSite, near
from affectlens.lens.live import config_of
from affectlens.sites import ATTENTION, MLP, Point, Site, Storage

_ACROSS = re.compile(r"(?i)cross|encoder_attn|encdec")
_WRAPPED = (".base_layer", ".original_module")


class Place(NamedTuple):
    """The input, output or attention mask of a module, wholly or some features of it."""

    module: str
    side: str  # "input", "output" or "mask"
    features: range | tuple[int, ...] | None  # indices of the last dimension; None for all
    positional: bool  # whether it has the positions of the text
    stack: str | None


def place_of(point: Point, *, model: nn.Module, live: Checkpoint) -> Place:
    """Find where a point is. Raises `NoSuchSite` and `LensError` for what can't be seen there."""
    if point.kind not in _KINDS:
        raise NoSuchSite(f"no point {point.kind!r}. Points: {near(point.kind, _KINDS)}")
    kind, site = _KINDS[point.kind], point.site
    where = live.at(site)  # an unknown site is an error before anything beside it is searched for
    if kind.module is not None:
        return _place(site, kind.module(site, model, live), kind.side, None)
    if kind.roles:
        site = _beside(point, kind, live)
        where = live.at(site)
    module = module_name(where)
    _refuse_hidden(point, where, model.get_submodule(module))
    return _place(site, module, kind.side, _features(point, where, live, side=kind.side))


def refuse_unheard(point: Point, place: Place, *, model: nn.Module) -> None:
    """Raise `LensError` for an output that nobody reads, so that a new one would do nothing."""
    module = model.get_submodule(place.module)
    if (
        point.site.role == "router"
        and point.kind != "residual"
        and place.side == "output"
        and not isinstance(module, nn.Linear)
    ):
        raise LensError(
            f"{point!r}: {type(module).__name__} chooses the experts inside itself, and nobody reads its "
            f"scores; change what goes in, or its weights"
        )


def module_name(where: Storage) -> str:
    """The module whose parameter a tensor is; around an adapted one, what computes with the adapter too."""
    name = parameter_name(where).rpartition(".")[0]
    name = name.partition(".modules_to_save.")[0]
    for wrapped in _WRAPPED:
        name = name.removesuffix(wrapped)
    return name


def parameter_name(where: Storage) -> str:
    """The name of the live parameter that a site lies in."""
    # What an adapter saved whole is kept under the name of its store, a colon, and its own.
    return where.tensor.rpartition(":")[2]


def _place(site: Site, module: str, side: str, features: range | tuple[int, ...] | None) -> Place:
    # Keys and values of attention across stacks are made of what the encoder said.
    across = site.role in ("k_proj", "v_proj") and _ACROSS.search(site.label)
    return Place(module, side, features, site.tower == "language", "encoder" if across else site.stack)


def _beside(point: Point, kind: "_Kind", live: Checkpoint) -> Site:
    """The site beside a point's that has one of the roles of its kind; the same head or neuron of it."""
    site, roles = point.site, kind.roles
    if site.role in roles:
        return site
    if site.role not in kind.asked_of:
        asked = ", ".join(kind.asked_of)
        raise LensError(f"{point!r}: {site.role} has no {point.kind}; it is asked of {asked}")
    path = module_name(live.at(site.at())).split(".")
    beside = [
        one
        for one in live.sites
        if one.role in roles
        and (one.tower, one.stack, one.layer, one.expert, one.param)
        == (site.tower, site.stack, site.layer, site.expert, "weight")
    ]
    if not beside:
        raise LensError(f"{point!r}: there is no {' or '.join(roles)} beside {site}")
    shared = live.units(site)
    if site.head is not None and shared and shared.shared > 1:
        raise LensError(f"{point!r}: {shared.shared} heads share it; ask the heads of o_proj")

    def shared_path(one: Site) -> int:
        pairs = zip(path, module_name(live.at(one)).split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    nearest = max(beside, key=shared_path)
    return nearest.at(head=site.head, neuron=site.neuron)


def _block(site: Site, model: nn.Module, live: Checkpoint) -> str:
    """The layer that a site is in."""
    parts = parameter_name(live.at(site)).split(".")
    found = [
        ".".join(parts[: at + 1])
        for at, part in enumerate(parts)
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:at])), nn.ModuleList)
    ]
    own = [name for name in found if name.endswith(f".{site.layer}")]
    if found:
        # Experts are numbered too, below the layer; towers in stages have layers below each stage.
        return found[0] if site.tower == "language" or not own else own[-1]
    raise LensError(f"{site} is in no layer, so no residual stream leaves it")


def _attention(site: Site, model: nn.Module, live: Checkpoint) -> str:
    """The attention that a site is in, which has to take a mask."""
    if site.role not in ATTENTION:
        raise LensError(f"{site} is no part of an attention; choose one of {', '.join(ATTENTION)}")
    name = module_name(live.at(site)).rpartition(".")[0]
    kinds = getattr(config_of(model), "get_text_config", lambda: None)()
    kinds = getattr(kinds, "layer_types", None) if site.tower == "language" else None
    if kinds and site.layer is not None and site.layer < len(kinds):
        kind = str(kinds[site.layer])
        if kind.startswith("linear") or "attention" not in kind:
            raise LensError(f"{site}: this layer is of kind {kind!r}, in which no query looks at keys")
    module = model.get_submodule(name)
    if "attention_mask" not in inspect.signature(module.forward).parameters:
        raise LensError(
            f"{site}: {type(module).__name__} takes no attention_mask, so nothing can be kept from it"
        )
    return name


def _refuse_hidden(point: Point, where: Storage, module: nn.Module) -> None:
    """Raise `LensError` for what a module computes inside and shows nobody."""
    leaf = parameter_name(where).rpartition(".")[2]
    if where.expert is not None:
        raise LensError(
            f"{point!r}: the experts of this model are one module, so no hook sees one of them; "
            f"their weights can be changed"
        )
    if leaf not in ("weight", "bias"):
        raise LensError(
            f"{point!r}: {leaf} is a parameter inside {type(module).__name__}, no module of its own"
        )


def _features(point: Point, where: Storage, live: Checkpoint, *, side: str) -> range | tuple[int, ...] | None:
    shape = live.store.headers[where.tensor].shape
    if len(shape) == 1 and side == "input":
        if where.unit is not None:
            raise LensError(f"{point!r}: a bias adds to the output, and has no features of the input")
        return None
    cut, unit = where.cut, where.unit
    turned = where.transposed and len(shape) == 2
    # The dimension of the stored tensor that counts features on this side.
    dim = 0 if (side == "output") != turned else len(shape) - 1
    width = shape[dim] if len(shape) == 1 or side == "output" or len(shape) == 2 else shape[1]
    found = list(range(width))
    if cut is not None and (cut.dim == dim or len(shape) == 1):
        found = [n for n in found if cut.start <= n % (cut.period or width) < cut.stop]
    if unit is not None:
        if unit.dim != (0 if side == "output" else 1) and len(where.shape) > 1:
            raise LensError(f"{point!r}: its features are not those of the {side}; ask the whole site")
        found = found[unit.start : unit.stop]
    return None if len(found) == width else _compact(found)


def _compact(numbers: list[int]) -> range | tuple[int, ...]:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    run = range(numbers[0], numbers[-1] + 1, step)
    return run if list(run) == numbers else tuple(numbers)


class _Kind(NamedTuple):
    """How a kind of point finds its place: at the site's own module, or at another one."""

    side: str  # of the module: "input", "output" or "mask"
    roles: tuple[str, ...] = ()  # the module is that of the nearest site with such a role
    asked_of: tuple[str, ...] = ()  # the roles of sites that have such a neighbour
    module: Callable[[Site, nn.Module, Checkpoint], str] | None = None  # or the module with this name


_MLPS = (*MLP, "fc1", "fc2")  # with a gate, and without one
# One row for each of `KINDS` in sites/points.py. Only a knockout uses "attention", which users can't name:
# what passes there is a mask, not an activation.
_KINDS: Mapping[str, _Kind] = {
    "output": _Kind("output"),
    "input": _Kind("input"),
    "pre_activation": _Kind("output", roles=("gate_proj", "fc1"), asked_of=_MLPS),
    "gated": _Kind("input", roles=("down_proj", "fc2"), asked_of=_MLPS),
    "heads": _Kind("input", roles=("o_proj",), asked_of=ATTENTION),
    "residual": _Kind("output", module=_block),
    "attention": _Kind("mask", module=_attention),
}
