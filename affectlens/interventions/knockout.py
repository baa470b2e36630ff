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
    softmax is over nothing. Any attention site of a layer stands for its attention. Raises `LensError` for an
    attention that takes no mask of queries and keys.
    """

    sites: Places
    source: Span = field(kw_only=True)
    target: Span = field(kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", only_sites(self.sites, "Knockout"))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """The mask of each attention without these pairs."""
        sites = only_sites(self.sites, "Knockout")
        return {Point(site, "attention"): partial(self._cut, site) for site in sites}

    def _cut(self, site: Site, mask: Tensor, moment: Moment | None) -> Tensor:
        if moment is None:
            raise LensError(f"{site}: the {site.tower} tower has no positions of the text to cut")
        keys, queries = moment.so_far(self.source), moment.chosen(self.target)
        blocked = queries[:, :, None] & keys[:, None, :]
        itself = torch.ones_like(blocked[0]).triu(moment.start).tril(moment.start)
        blocked = blocked & ~itself
        return without(mask, blocked) if bool(blocked.any()) else mask
