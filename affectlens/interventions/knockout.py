"""Knockout: keep some positions from attending to others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from affectlens.errors import LensError
from affectlens.interventions.selecting import Places, only_sites
from affectlens.lens import Lens, Moment, Rewrite, without
from affectlens.sites import Point, Site, Span


@dataclass(frozen=True)
class Knockout:
    """Cut attention from the positions of `target` to those of `source`, in the layers of `sites`.

    `Knockout(sites.where(role="o_proj", layer=range(9)), source="image", target="last")`: for nine layers the
    last token does not see the picture (arXiv 2304.14767). A position never loses sight of itself, so no
    softmax is over nothing. Any attention site of a layer stands for its attention; where a decoder attends
    to its encoder, `source` is of the encoder's tokens. Raises `LensError` for an attention that takes no
    mask of queries and keys.
    """

    sites: Places
    source: Span = field(kw_only=True)
    target: Span = field(kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", only_sites(self.sites, "Knockout"))
        for end in ("source", "target"):  # an unknown span is told here
            found = only_sites(self.sites, "Knockout").at("residual", span=getattr(self, end))
            object.__setattr__(self, end, found[0].span)

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """The mask of each attention without these pairs."""
        sites = only_sites(self.sites, "Knockout")
        return {Point(site, "attention"): partial(self._cut, site) for site in sites}

    def _cut(self, site: Site, mask: Tensor, moment: Moment | None) -> Tensor:
        if moment is None:
            raise LensError(f"{site}: the {site.tower} tower has no positions of the text to cut")
        keys, queries = (moment.across or moment).so_far(self.source), moment.chosen(self.target)
        blocked = queries[:, :, None] & keys[:, None, moment.first_key :]
        if moment.across is None:
            behind = moment.start - moment.first_key
            blocked = blocked & ~torch.ones_like(blocked[0]).triu(behind).tril(behind)
        return without(mask, blocked) if bool(blocked.any()) else mask
