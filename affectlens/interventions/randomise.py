"""Randomise and Shuffle: weights, or a change of weights, that keep their size and lose their meaning.

They are floors: isotropic noise does next to nothing to behaviour, so beating it shows little. The nulls that
can fail are real changes of other roles and of a control tuning (`affectlens.Grid`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from affectlens.checkpoints import Checkpoint, Source
from affectlens.interventions.editing import Edit, Edits
from affectlens.interventions.selecting import Places, only_sites
from affectlens.interventions.transplant import fitting_donor
from affectlens.sites import Site


@dataclass(frozen=True)
class Randomise:
    """Replace sites' weights by Gaussian noise of the same Frobenius norm.

    With a `donor`, only the change W_donor − W is replaced by noise of its norm. The noise of a site depends
    on `seed` and the site alone, so other sites beside it change nothing. Raises as `Transplant` does.
    """

    sites: Places
    seed: int = field(default=0, kw_only=True)
    donor: Source | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", only_sites(self.sites, "Randomise"))

    def edits(self, live: Checkpoint) -> Edits:
        """Noise instead of each site's weights, or of their change."""
        sites = only_sites(self.sites, "Randomise")
        return Edits(sites, _replaced(self, live, _noise), rowwise=False)


@dataclass(frozen=True)
class Shuffle:
    """Put the entries of each site's weights in another order, drawn by `seed`.

    With a `donor`, those of the change W_donor − W. Raises as `Transplant` does.
    """

    sites: Places
    seed: int = field(default=0, kw_only=True)
    donor: Source | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", only_sites(self.sites, "Shuffle"))

    def edits(self, live: Checkpoint) -> Edits:
        """The same entries elsewhere, or those of the change."""
        sites = only_sites(self.sites, "Shuffle")
        return Edits(sites, _replaced(self, live, _shuffled), rowwise=False)


Meaningless = Callable[[Tensor, torch.Generator], Tensor]


def _replaced(which: Randomise | Shuffle, live: Checkpoint, meaningless: Meaningless) -> Edit:
    sites = only_sites(which.sites, type(which).__name__)
    donor = None if which.donor is None else fitting_donor(which.donor, live, sites=sites)

    def edit(site: Site, wanted: slice | None = None) -> Tensor:
        here = live.read(site)
        generator = torch.Generator().manual_seed(_seed(which.seed, site))
        # On the CPU: the generators of devices draw other numbers.
        ours = here.cpu().float()
        if donor is None:
            new = meaningless(ours, generator)
        else:
            new = ours + meaningless(donor.read(site).cpu().float() - ours, generator)
        new = new.to(device=here.device, dtype=here.dtype)
        return new if wanted is None else new[wanted]

    return edit


def _noise(values: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(values.shape, generator=generator)
    size = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return drawn * (size / max(float(torch.linalg.vector_norm(drawn, dtype=torch.float64)), 1e-300))


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(values.numel(), generator=generator)
    return values.reshape(-1)[order].reshape(values.shape)


def _seed(seed: int, site: Site) -> int:
    # Python's own hash of a text is another in each process.
    return int.from_bytes(hashlib.sha256(f"{seed} {site!r}".encode()).digest()[:7])
