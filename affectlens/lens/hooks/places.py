"""Find the place of a point in a live model: which module, its input or output, and which features.

    Point (site, kind) ──▶ its row in `_KINDS` ──▶ Place (module, side, features of the last dimension)

A site knows which slice of a stored matrix it is. The same slice of the module's output belongs to it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

from torch import nn

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, NoSuchSite, near
from affectlens.lens.inputs.placeholders import MEDIA
from affectlens.lens.live import answering, config_of, inner
from affectlens.sites import ATTENTION, MLP, Point, Site, Span, Storage
from affectlens.sites.points import KINDS

_CROSS_ATTENTION = re.compile(r"(?i)cross|encoder_attn|encdec")
HEAD_NORMS = ("q_norm", "k_norm")  # heads may come before positions there
_WRAPPED = (".base_layer", ".original_module")


class Place(NamedTuple):
    """The input, output or attention mask of a module: all features of it, or some."""

    module: str
    side: str  # "input", "output" or "mask"
    features: range | tuple[int, ...] | None  # indices of the last dimension, of a mask: heads; None for all
    positional: bool  # whether the second dimension is the positions of the text
    stack: str | None  # "encoder", "decoder", or None in a model with one stack
    heads: int = 0  # how many a mask with one head in `features` has
    stream: bool = False  # the residual stream between layers, which has no heads
    streams: int = 1  # how many residual streams pass there, (stream, batch, position, feature)


def place_of(point: Point, *, model: nn.Module, live: Checkpoint) -> Place:
    """Find the place of a point.

    Raises `NoSuchSite` for an unknown site or kind, and `LensError` where no hook can see the point.
    """
    if point.kind not in _KINDS:
        raise NoSuchSite(f"no point {point.kind!r}. Points: {near(point.kind, KINDS)}")
    kind, site = _KINDS[point.kind], point.site
    where = live.at(site)  # raises for an unknown site, before the search for its neighbours
    if kind.module is not None:
        found = _place(site, kind.module(site, model, live), kind.side, None)
        if kind.side == "mask":
            return _of_head(point, found, live)
        if where.unit is not None:
            raise LensError(
                f"{point!r}: a head or neuron has no {point.kind} of its own: all of them share it. Choose "
                f"the whole site, or the unit at another point, such as 'heads' or 'gated'"
            )
        return found._replace(stream=True, streams=_streams(site, model))
    if names_medium(point.span) and writes_placeholders(point, model=model, live=live):
        return _entering(site, model, live)
    if kind.roles:
        site = _beside(point, kind, live)
        where = live.at(site)
    module = module_name(where)
    _refuse_hidden(point, where, model.get_submodule(module))
    return _place(site, module, kind.side, _features(point, where, live, side=kind.side))


def refuse_unheard(point: Point, place: Place, *, model: nn.Module) -> None:
    """Raise `LensError` for an output that no module reads: a new value there would have no effect."""
    module = model.get_submodule(place.module)
    if (
        point.site.role == "router"
        and point.kind != "residual"
        and place.side == "output"
        and not isinstance(module, nn.Linear)
    ):
        raise LensError(
            f"{point!r}: {type(module).__name__} chooses the experts inside itself, and no module reads its "
            f"scores. Change its input or its weights"
        )


def names_medium(span: Span) -> bool:
    """Return whether a span is a medium, or a part of one."""
    return isinstance(span, str) and span.partition(":")[0] in MEDIA


def writes_placeholders(point: Point, *, model: nn.Module, live: Checkpoint) -> bool:
    """Return whether a point is the output of the input embedding, where media have placeholders."""
    if (point.kind, point.site.role, point.site.tower) != ("output", "embed_tokens", "language"):
        return False
    with suppress(AttributeError, NotImplementedError):
        embedding = inner(answering(model)).get_input_embeddings()  # type: ignore[operator]
        return embedding is model.get_submodule(module_name(live.at(point.site)))
    return False


def _entering(site: Site, model: nn.Module, live: Checkpoint) -> Place:
    """Return the input of the first layer: media replace their placeholders after the input embedding."""
    stacks = (site.stack, "encoder")  # an encoder and a decoder may share the embedding
    layers = [s for s in live.sites if (s.tower, s.layer) == (site.tower, 0) and s.stack in stacks]
    if not layers:
        raise LensError(
            f"{site}: after the input embedding, the model replaces these positions by the output of a "
            f"tower, and the first layer was not found. Choose a point inside a layer"
        )
    first = layers[0]
    place = _place(first, _block(first, model, live), "input", None)
    return place._replace(stream=True, streams=_streams(first, model))


def module_name(where: Storage) -> str:
    """Return the name of the module that owns a parameter; for an adapted one, the adapter's wrapper.

    The wrapper computes with the matrix and the adapter together, so this is where activations pass.
    """
    name = parameter_name(where).rpartition(".")[0]
    name = name.partition(".modules_to_save.")[0]
    for wrapped in _WRAPPED:
        name = name.removesuffix(wrapped)
    return name


def parameter_name(where: Storage) -> str:
    """Return the name of the live parameter that contains a site."""
    # A tensor that an adapter saved whole is named 'store:tensor'.
    return where.tensor.rpartition(":")[2]


def _place(site: Site, module: str, side: str, features: range | tuple[int, ...] | None) -> Place:
    # In cross-attention the decoder computes keys and values from the encoder's output, so their positions
    # are those of the encoder.
    across = site.role in ("k_proj", "v_proj") and _CROSS_ATTENTION.search(site.label)
    return Place(module, side, features, site.tower == "language", "encoder" if across else site.stack)


def _of_head(point: Point, place: Place, live: Checkpoint) -> Place:
    """Return the place of a mask for the head that a site names, if it names one."""
    site = point.site
    if site.head is None:
        return place
    units = live.units(site)
    if units is None or units.shared > 1:
        raise LensError(
            f"{point!r}: {units.shared if units else 'several'} query heads share this head, so it has no "
            f"mask of its own. Choose heads of o_proj"
        )
    return place._replace(features=range(site.head, site.head + 1), heads=units.count)


def _streams(site: Site, model: nn.Module) -> int:
    """Return how many residual streams a layer passes on, before the batch: AltUp of Gemma-3n."""
    text = getattr(config_of(model), "get_text_config", lambda: None)()
    return getattr(text, "altup_num_inputs", 1) if site.tower == "language" else 1


def _beside(point: Point, kind: "_Kind", live: Checkpoint) -> Site:
    """Return the nearest site with a role of this kind, for the same head or neuron."""
    site, roles = point.site, kind.roles
    if site.role in roles:
        return site
    if site.role not in kind.asked_of:
        asked = ", ".join(kind.asked_of)
        raise LensError(f"{point!r}: {site.role} has no {point.kind}. Sites that have it: {asked}")
    path = module_name(live.at(site.at())).split(".")
    beside = [
        one
        for one in live.sites
        if one.role in roles
        and (one.tower, one.stack, one.layer, one.expert, one.param)
        == (site.tower, site.stack, site.layer, site.expert, "weight")
    ]
    if not beside:
        raise LensError(f"{point!r}: the module around {site} has no {' or '.join(roles)}")
    shared = live.units(site)
    if site.head is not None and shared and shared.shared > 1:
        raise LensError(
            f"{point!r}: {shared.shared} query heads share this head, so it has no place of its own. "
            f"Choose heads of o_proj"
        )

    def shared_path(one: Site) -> int:
        # In a layer with self- and cross-attention, the neighbour is in the same one as the site.
        pairs = zip(path, module_name(live.at(one)).split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    nearest = max(beside, key=shared_path)
    return nearest.at(head=site.head, neuron=site.neuron)


def _block(site: Site, model: nn.Module, live: Checkpoint) -> str:
    """Return the name of the layer that contains a site."""
    parts = parameter_name(live.at(site)).split(".")
    found = [
        ".".join(parts[: at + 1])
        for at, part in enumerate(parts)
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:at])), nn.ModuleList)
    ]
    own = [name for name in found if name.endswith(f".{site.layer}")]
    if found:
        # The outermost number is the layer in a language model: below it, experts are numbered too. A
        # vision tower with stages numbers the stages first, so there the innermost match counts.
        return found[0] if site.tower == "language" or not own else own[-1]
    raise LensError(f"{site} is outside the layers, so it has no residual stream")


def _attention(site: Site, model: nn.Module, live: Checkpoint) -> str:
    """Return the name of the attention that contains a site; it must take a mask of queries and keys."""
    if site.role not in ATTENTION:
        raise LensError(f"{site} does not belong to an attention. Roles that do: {', '.join(ATTENTION)}")
    name = module_name(live.at(site)).rpartition(".")[0]
    kinds = getattr(config_of(model), "get_text_config", lambda: None)()
    kinds = getattr(kinds, "layer_types", None) if site.tower == "language" else None
    if kinds and site.layer is not None and site.layer < len(kinds):
        kind = str(kinds[site.layer])
        if kind.startswith("linear") or "attention" not in kind:
            raise LensError(f"{site}: a layer of kind {kind!r} has no scores of queries and keys to mask")
    module = model.get_submodule(name)
    if "attention_mask" not in inspect.signature(module.forward).parameters:
        raise LensError(
            f"{site}: {type(module).__name__} takes no attention_mask, so a knockout is not possible here"
        )
    return name


def _refuse_hidden(point: Point, where: Storage, module: nn.Module) -> None:
    """Raise `LensError` for activations that stay inside a module, where no hook sees them."""
    leaf = parameter_name(where).rpartition(".")[2]
    if where.expert is not None:
        raise LensError(
            f"{point!r}: one module computes all experts of this layer, so no hook sees a single expert. "
            f"Change its weights instead"
        )
    if leaf not in ("weight", "bias"):
        raise LensError(
            f"{point!r}: {leaf} is a bare parameter of {type(module).__name__} without a module of its own, "
            f"so no hook sees its input or output"
        )


def _features(point: Point, where: Storage, live: Checkpoint, *, side: str) -> range | tuple[int, ...] | None:
    """Return which features of a module's input or output belong to a point; None for all of them."""
    shape = live.store.headers[where.tensor].shape
    if len(shape) == 1 and side == "input":
        if where.unit is not None:
            raise LensError(f"{point!r}: a bias is added to the output, so no input features belong to it")
        return None
    cut, unit = where.cut, where.unit
    turned = where.transposed and len(shape) == 2
    # Which dimension of the stored tensor runs over the features on this side: (out, in), or transposed.
    dim = 0 if (side == "output") != turned else len(shape) - 1
    width = shape[dim] if len(shape) == 1 or side == "output" or len(shape) == 2 else shape[1]
    found = list(range(width))
    if cut is not None and (cut.dim == dim or len(shape) == 1):
        found = [n for n in found if cut.start <= n % (cut.period or width) < cut.stop]
    if unit is not None:
        if unit.dim != (0 if side == "output" else 1) and len(where.shape) > 1:
            raise LensError(
                f"{point!r}: a head or neuron of {point.site.role} is not a part of its {side}. "
                f"Choose the whole site"
            )
        found = found[unit.start : unit.stop]
    return None if len(found) == width else _compact(found)


def _compact(numbers: list[int]) -> range | tuple[int, ...]:
    """Return the numbers as a range where they are one: slicing is a view, an index list a copy."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    run = range(numbers[0], numbers[-1] + 1, step)
    return run if list(run) == numbers else tuple(numbers)


class _Kind(NamedTuple):
    """A rule for the place of a kind of point: the module of the site, unless the rule names another one."""

    side: str  # "input", "output" or "mask" of the module
    roles: tuple[str, ...] = ()  # use the module of the nearest site with one of these roles
    asked_of: tuple[str, ...] = ()  # roles of the sites for which that makes sense
    module: Callable[[Site, nn.Module, Checkpoint], str] | None = None  # or find the module with this


_MLPS = (*MLP, "fc1", "fc2")  # with a gate, and without one
# One row for each kind in `KINDS` (sites/points.py), and "attention" for knockouts alone: a mask passes
# there, and a mask set to zero or steered would not mean what it seems to.
_KINDS: Mapping[str, _Kind] = {
    "output": _Kind("output"),
    "input": _Kind("input"),
    "pre_activation": _Kind("output", roles=("gate_proj", "fc1"), asked_of=_MLPS),
    "gated": _Kind("input", roles=("down_proj", "fc2"), asked_of=_MLPS),
    "heads": _Kind("input", roles=("o_proj",), asked_of=ATTENTION),
    "residual": _Kind("output", module=_block),
    "attention": _Kind("mask", module=_attention),
}
