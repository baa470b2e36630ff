"""Find the sites of a checkpoint or model from names and shapes, each with its storage."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from affectlens.errors import CheckpointError
from affectlens.sites.layout import Laid, lay_out
from affectlens.sites.names import INDEX
from affectlens.sites.site import Cut, Shape, Site, Storage, stored

Shapes = Mapping[str, tuple[int, ...]]
# Sites; the largest models have a fifth of it, and a header of a few bytes may claim any number.
_MOST = 500_000
# Config entries that differ between saves of one model and say nothing about its layout.
_ABOUT_THE_SAVE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
# A role below these parents is the layer's own. Below another, such as a cross attention, it gets a label.
_OWN = re.compile(
    r"|(?:(?:self_attn|attn|attention|self_attention|mlp|feed_forward|ffn|ff|block_sparse_moe|moe|mixer"
    r"|intermediate|output|attention\.(?:self|attention|output|attn|self_attention))(?:\.experts)?(?:\.mlp)?)"
)
_EXPERT = re.compile(rf"(?:^|(?<=\.))experts(?:\.(?:expert_)?{INDEX})?(?:\.|$)")
_SHARED = frozenset(
    {"norm", "other", "learned_token", "proj", "fc1", "fc2", "conv", "conv_pw", "scale", "pos_embed"}
)
_PREFIXES = re.compile(r"^(?:(?:thinker|model|language_model|llm)\.)+")  # they differ between releases
_ALONE = ("embed_tokens", "lm_head")


def locate(
    shapes: Mapping[str, Shape],
    source: str = "these names",
    *,
    config: Mapping[str, Any] | None = None,
    context: Mapping[str, Shape] | None = None,
) -> dict[Site, Storage]:
    """Find the sites of a checkpoint or model from the names and shapes of its tensors.

    `config` has the numbers of heads that some fused tensors need. `context` holds the tensors of the same
    model that are stored elsewhere: a lone `up_proj` is ambiguous without its siblings. Every element of
    every tensor belongs to exactly one site; a fused tensor is split exactly, or stays whole. Raises
    `CheckpointError` if two tensors claim one site.

    >>> found = locate({"model.layers.0.mlp.gate_up_proj.weight": (8, 2), \
"model.layers.0.mlp.down_proj.weight": (2, 4)})
    >>> [(site, storage.shape) for site, storage in found.items() if "up" in storage.tensor]
    [(language.0.gate_proj, (4, 2)), (language.0.up_proj, (4, 2))]
    """
    return sites_of(lay_out(shapes, config, context=context), source)


def sites_of(laid: Mapping[str, Laid], source: str = "these names") -> dict[Site, Storage]:
    """Find the sites of tensors that `lay_out` described, each with its storage, in the order of sites."""
    sites: dict[Site, Storage] = {}
    # Sorted by name, so that a clash ends the same way whatever the order of tensors in the file.
    for tensor in sorted(laid, key=lambda tensor: (laid[tensor].name, tensor)):
        for site, storage in _sites(tensor, laid[tensor]):
            found = site
            if site in sites and laid[sites[site].tensor].name != laid[tensor].name:
                found = replace(site, label=laid[tensor].name)  # an unknown structure: keep both sites
            if found in sites:
                reason = f"names the same parameter as {sites[found].tensor!r} ({found})"
                raise CheckpointError(source, reason, key=tensor)
            sites[found] = storage
            if len(sites) > _MOST:
                reason = f"has more than {_MOST:,} parameters, counting each expert"
                raise CheckpointError(source, reason)
    return in_order(sites)


def in_order(sites: Mapping[Site, Storage]) -> dict[Site, Storage]:
    """Return sites with their storage in the order of sites."""
    return dict(sorted(sites.items(), key=lambda item: item[0]))


def placed(
    shapes: Shapes, config: Mapping[str, Any], *, context: Shapes, source: str
) -> tuple[Mapping[str, Laid], Mapping[Site, Storage]]:
    """Describe the tensors of a checkpoint and find its sites. Raises `CheckpointError` as `locate` does.

    Base and tuned mostly have the same names, so the result is cached.
    """
    # Two saves that differ in these entries alone share one result of the cache.
    known = {key: value for key, value in config.items() if key not in _ABOUT_THE_SAVE}
    try:
        text = json.dumps(known, default=str)
        laid, storage = _layout(tuple(shapes.items()), text, tuple(context.items()))
        return dict(laid), dict(storage)
    except CheckpointError as error:
        raise CheckpointError(source, error.reason, key=error.key) from None


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
    """Return what distinguishes a site from others of its layer and role; empty for the layer's own."""
    at, role = laid.place.position, laid.place.role
    if role in _ALONE:
        return ""
    local = _EXPERT.sub("", at.local).removesuffix(".")
    if at.layer is None or role in _SHARED:
        return _PREFIXES.sub("", local)
    parent = _EXPERT.sub("", at.local.rpartition(".")[0]).removesuffix(".")
    return "" if _OWN.fullmatch(parent) else parent


@lru_cache(maxsize=4)
def _layout(
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    config: str,
    context: tuple[tuple[str, tuple[int, ...]], ...],
) -> tuple[Mapping[str, Laid], Mapping[Site, Storage]]:
    """Describe tensors and find their sites, once for checkpoints with the same names and config."""
    laid = lay_out(dict(shapes), json.loads(config), context=dict(context))
    return laid, sites_of(laid)
