"""Transplant: a donor's weights at some sites, wholly or in part."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.errors import LensError
from affectlens.interventions.selecting import selected
from affectlens.sites import Site


@dataclass(frozen=True)
class Transplant:
    """Give sites the donor's weights: W + alpha · (W_donor − W).

    Into base from tuned it asks whether the change there is sufficient (arXiv 2302.06600); into
    tuned from base it reverts the change and asks whether it is necessary. `alpha` 0 and 1 copy, so
    they are exact to the bit; other values are computed in float32. Raises `NoSuchSite` where the
    donor lacks a site and `LensError` where its shape differs.
    """

    sites: Site | Iterable[Site]
    donor: Source = field(kw_only=True)
    alpha: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", selected(self.sites))

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """The donor's values, mixed with the live ones where `alpha` says so."""
        donor = open_checkpoint(self.donor)
        new = {}
        for site in selected(self.sites):
            if donor.shape(site) != live.shape(site):
                raise LensError(
                    f"{site} has shape {live.shape(site)} here and {donor.shape(site)} in {donor.store.name}"
                )
            new[site] = self._mix(live.read(site), donor.read(site))
        return new

    def _mix(self, here: Tensor, there: Tensor) -> Tensor:
        if self.alpha == 0:
            return here
        if self.alpha == 1:
            return there
        ours, theirs = here.float(), there.to(here.device).float()
        return (ours + self.alpha * (theirs - ours)).to(here.dtype)
