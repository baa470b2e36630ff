"""Zero: delete what a site carries."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.interventions.selecting import selected
from affectlens.sites import Site


@dataclass(frozen=True)
class Zero:
    """Set sites to zero.

    In a gated MLP act(gate)·up with act(0) = 0 and no biases, zeroing gate, up or down gives the same
    logits, those without the MLP: such a result can't speak for the gate.
    """

    sites: Site | Iterable[Site]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", selected(self.sites))

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        """Zeros of each site's shape."""
        return {site: torch.zeros_like(live.read(site)) for site in selected(self.sites)}
