"""From names and shapes to sites, each with the storage it lies in."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from affectlens.errors import CheckpointError
from affectlens.sites.layout import Laid, lay_out
from affectlens.sites.names import INDEX
from affectlens.sites.site import Cut, Shape, Site, Storage, stored

if TYPE_CHECKING:
    pass

# A role below these parents is the layer's own; below any other (a cross attention) it is labelled.
_OWN = re.compile(
    r"|(?:(?:self_attn|attn|attention|self_attention|mlp|feed_forward|ffn|ff|block_sparse_moe|moe|mixer"
    r"|intermediate|output|attention\.(?:self|attention|output|attn|self_attention))(?:\.experts)?(?:\.mlp)?)"
)
_EXPERT = re.compile(rf"(?:^|(?<=\.))experts(?:\.(?:expert_)?{INDEX})?(?:\.|$)")
_SHARED = frozenset(
    {"norm", "other", "learned_token", "proj", "fc1", "fc2", "conv", "conv_pw", "scale", "pos_embed"}
)
_PREFIXES = re.compile(
    r"^(?:(?:thinker|model|language_model|llm)\.)+"
)  # where towers hang differs by release
_ALONE = ("embed_tokens", "lm_head")
_MOST = (
    500_000  # sites; the largest models have a fifth of it, and a header of a few bytes may claim any number
)
Shapes = Mapping[str, tuple[int, ...]]
# What tells saves of one model apart, and nothing of its layout.
_ABOUT_THE_SAVE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def locate(
    shapes: Mapping[str, Shape],
    source: str = "these names",
    *,
    config: Mapping[str, Any] | None = None,
    context: Mapping[str, Shape] | None = None,
) -> dict[Site, Storage]:
    """Find the sites of a checkpoint or model from the names and shapes of its tensors.

    `config` gives the numbers of heads that some fused tensors need; `context` the tensors of the same
    model that are stored elsewhere, without which a lone `up_proj` says little. Every element of every
    tensor belongs to exactly one site: a fused tensor is split exactly, or left whole. Raises
    `CheckpointError` when two tensors claim one site.
    """
    return sites_of(lay_out(shapes, config, context=context), source)


def sites_of(laid: Mapping[str, Laid], source: str = "these names") -> dict[Site, Storage]:
    """The sites of tensors that are laid out, each with its storage, in order."""
    sites: dict[Site, Storage] = {}
    # In the order of names: what becomes of a clash must not depend on how a file happens to be sorted.
    for tensor in sorted(laid, key=lambda tensor: (laid[tensor].name, tensor)):
        for site, storage in _sites(tensor, laid[tensor]):
            found = site
            if site in sites and laid[sites[site].tensor].name != laid[tensor].name:
                found = replace(site, label=laid[tensor].name)  # a structure unknown here: keep them apart
            if found in sites:
                reason = f"names the same parameter as {sites[found].tensor!r} ({found})"
                raise CheckpointError(source, reason, key=tensor)
            sites[found] = storage
            if len(sites) > _MOST:
                reason = f"more than {_MOST:,} parameters, with experts counted one by one"
                raise CheckpointError(source, reason)
    return dict(sorted(sites.items(), key=lambda item: item[0]))


def _sites(tensor: str, laid: Laid) -> Iterator[tuple[Site, Storage]]:
    at, role = laid.place.position, laid.place.role
    parts: tuple[tuple[str, Cut | None], ...] = laid.fused.cuts() if laid.fused else ((role, None),)
    whole = Site(at.tower, role, at.layer, at.stack, laid.param, None, _label(laid), laid.memory)
    # Experts laid end to end in one matrix are one site: their number is not in the shape.
    stacked = laid.expert == "stacked" and len(laid.shape) == (2 if laid.param == "bias" else 3)
    single = None if isinstance(laid.expert, str) else laid.expert
    experts: Iterable[int | None] = range(laid.shape[0]) if stacked else (single,)
    for number in experts:
        for part, cut in parts:
            place = stored(
                tensor, laid.shape, expert=number if stacked else None, cut=cut, transposed=laid.transposed
            )
            yield replace(whole, role=part, expert=number), place


def _label(laid: Laid) -> str:
    """What tells a site from the others of its layer and role; empty for the layer's own."""
    at, role = laid.place.position, laid.place.role
    if role in _ALONE:
        return ""
    local = _EXPERT.sub("", at.local).removesuffix(".")
    if at.layer is None or role in _SHARED:
        return _PREFIXES.sub("", local)
    parent = _EXPERT.sub("", at.local.rpartition(".")[0]).removesuffix(".")
    return "" if _OWN.fullmatch(parent) else parent


def _placed(
    source: str, shapes: Shapes, config: Mapping[str, Any], *, context: Shapes
) -> tuple[Mapping[str, Laid], Mapping[Site, Storage]]:
    known = {key: value for key, value in config.items() if key not in _ABOUT_THE_SAVE}
    try:
        text = json.dumps(known, default=str)
        laid, storage = _layout(tuple(shapes.items()), text, tuple(context.items()))
        return dict(laid), dict(storage)
    except CheckpointError as error:
        raise CheckpointError(source, error.reason, key=error.key) from None


@lru_cache(maxsize=4)
def _layout(
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    config: str,
    context: tuple[tuple[str, tuple[int, ...]], ...],
) -> tuple[Mapping[str, Laid], Mapping[Site, Storage]]:
    """Base and tuned mostly have the same names: what they say is worked out once."""
    laid = lay_out(dict(shapes), json.loads(config), context=dict(context))
    return laid, sites_of(laid)
