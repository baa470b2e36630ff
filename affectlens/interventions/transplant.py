"""Transplant: a donor's weights at some sites, wholly or in part."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.memory import MemoryStore
from affectlens.errors import LensError
from affectlens.interventions.editing import Edits
from affectlens.interventions.leaving import left_behind
from affectlens.interventions.selecting import Places, finite, only_sites
from affectlens.lens import Lens
from affectlens.sites import Site, Sites


@dataclass(frozen=True)
class Transplant:
    """Give sites the donor's weights: W + alpha · (W_donor − W).

    Into base from tuned it asks whether the change there is sufficient (arXiv 2302.06600); into
    tuned from base it reverts the change and asks whether it is necessary. `alpha` 0 and 1 copy, so
    they are exact to the bit; other values interpolate or amplify, computed in float32. Raises
    `NoSuchSite` where the donor lacks a site and `LensError` where its shape differs.
    """

    sites: Places
    donor: Source = field(kw_only=True)
    alpha: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", only_sites(self.sites, "Transplant"))
        finite("alpha", self.alpha)

    def __repr__(self) -> str:
        donor = self.donor.store.name if isinstance(self.donor, Checkpoint) else self.donor
        named = donor if isinstance(donor, str | Path) else type(donor).__name__
        return f"Transplant({self.sites!r}, donor={str(named)!r}, alpha={self.alpha:g})"

    def edits(self, live: Checkpoint) -> Edits:
        """The donor's values, mixed with the live ones where `alpha` says so."""
        sites = only_sites(self.sites, "Transplant")
        donor = fitting_donor(self.donor, live, sites=sites)

        def edit(site: Site, wanted: slice | None = None) -> Tensor:
            if self.alpha == 0:
                return live.read(site, wanted)
            there = donor.read(site, wanted)
            return there if self.alpha == 1 else _mixed(live.read(site, wanted), there, alpha=self.alpha)

        def lying(site: Site) -> Span | None:
            alike = (
                self.alpha == 1 and site.at() not in donor.factors and donor.dtype(site) == live.dtype(site)
            )
            return donor.span(site) if alike else None

        return Edits(sites, edit, lying=lying)

    def remarks(self, lens: Lens) -> Sequence[str]:
        """What of the donor is not in its weights at these sites, and does not come with them."""
        sites = only_sites(self.sites, "Transplant")
        return left_behind(lens, self.donor, sites=sites) if self.alpha else ()


def fitting_donor(donor: Source, live: Checkpoint, *, sites: Sites) -> Checkpoint:
    """Open a donor; an adapter is read over the weights as they were. Raises for a site that does not fit."""
    found = open_checkpoint(donor, base=live.untouched)
    if isinstance(found.store, MemoryStore) and found.store.shares(live.store):
        found = found.untouched  # the live model itself: to put it back is to put back what was there
    for site in sites:
        if found.shape(site) != live.shape(site):
            raise LensError(
                f"{site} has shape {live.shape(site)} here and {found.shape(site)} in {found.store.name}"
            )
    return found


def _mixed(here: Tensor, there: Tensor, *, alpha: float) -> Tensor:
    ours, theirs = here.float(), there.to(here.device).float()
    return (ours + alpha * (theirs - ours)).to(here.dtype)
