"""What a transplant leaves behind: a donor is more than its weights."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.checkpoints.configs import differing
from affectlens.lens import Lens
from affectlens.sites import Site, Sites

_VOCABULARY = ("embed_tokens", "lm_head")


def left_behind(lens: Lens, source: Source, *, sites: Sites) -> Sequence[str]:
    """Say in sentences what tells the donor apart, beside its weights at these sites.

    Base with all of tuned's weights is tuned to the bit only where there is nothing to say.
    """
    donor = open_checkpoint(source, base=lens.checkpoint.untouched)
    return tuple(_sentences(lens, donor, sites))


def _sentences(lens: Lens, donor: Checkpoint, sites: Sites) -> Iterator[str]:
    live, name = lens.checkpoint, donor.store.name
    # A config in memory has every setting, one on disk those that were written: like is held to like.
    ours = lens.source if lens.source is not None and donor.store.format != "memory" else live
    if settings := differing(ours.config, donor.config):
        yield f"{name} has another config, which a transplant does not carry over: {', '.join(settings)}."
    merged = [site for site in sites if site.at() in donor.factors]
    if merged:
        yield (
            f"{len(merged)} of these sites of {name} are changed by an adapter, and are merged here: a model "
            f"that keeps the adapter apart rounds otherwise (first: {merged[0]})."
        )
    recast = [
        site for site in sites if site.at() not in donor.factors and donor.dtype(site) != ours.dtype(site)
    ]
    if recast:
        kinds = f"{donor.dtype(recast[0])} in {name} and {ours.dtype(recast[0])} here"
        yield f"{len(recast)} of these sites are {kinds} (first: {recast[0]})."
    if donor.tied != live.tied and any(site.role in _VOCABULARY for site in sites):
        tied, own = (name, "here") if donor.tied else ("this model", f"in {name}")
        yield f"The output embedding of {tied} is its input embedding, and one of its own {own}."
    astray = [site for site in _buffers(lens) - sites if site in donor.sites and _differs(live, donor, site)]
    if astray:
        words = f"{len(astray)} buffers of {name} have other values, and are not among these sites"
        yield f"{words} (first: {astray[0]})."


def _buffers(lens: Lens) -> Sites:
    tensors = lens.parameters
    storage = lens.checkpoint.storage
    return Sites(s for s, where in storage.items() if not isinstance(tensors.get(where.tensor), nn.Parameter))


def _differs(live: Checkpoint, donor: Checkpoint, site: Site) -> bool:
    here, there = live.read(site), donor.read(site)
    return here.shape != there.shape or not torch.equal(here.cpu(), there.to(here.dtype).cpu())
