"""Zero: delete what a site carries, or what passes a point."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from affectlens.checkpoints import Checkpoint
from affectlens.interventions.deleting import deleted_mlps
from affectlens.interventions.editing import Edits, elementwise
from affectlens.interventions.selecting import Places, selected
from affectlens.lens import Lens, Rewrite
from affectlens.sites import Point, Sites


@dataclass(frozen=True)
class Zero:
    """Set weights, or activations, to zero.

    In a gated MLP act(gate)·up with act(0) = 0 and no biases, zeroing gate, up or down gives the same
    logits, those without the MLP: such a result can't speak for the gate. Where that holds of what is
    zeroed, a `Remark` says so.
    """

    places: Places

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", selected(self.places))

    def edits(self, live: Checkpoint) -> Edits:
        """Zeros of each site's shape; none for points."""
        found = selected(self.places)
        return Edits(found if isinstance(found, Sites) else Sites(()), elementwise(live, torch.zeros_like))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """Zeros at each point; none for sites."""
        found = selected(self.places)
        return (
            {}
            if isinstance(found, Sites)
            else dict.fromkeys(found, lambda values, _: torch.zeros_like(values))
        )

    def remarks(self, lens: Lens) -> Sequence[str]:
        """Whether this deletes whole MLPs."""
        found = selected(self.places)
        return deleted_mlps(lens, found) if isinstance(found, Sites) else ()
