"""Scale: more or less of what a site carries, or of what passes a point."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.interventions.editing import Edits, elementwise
from affectlens.interventions.selecting import Places, finite, selected
from affectlens.lens import Lens, Rewrite
from affectlens.sites import Point, Sites


@dataclass(frozen=True)
class Scale:
    """Multiply weights, or activations, by `factor`; 1 changes nothing."""

    places: Places
    factor: float = field(kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", selected(self.places))
        finite("factor", self.factor)

    def edits(self, live: Checkpoint) -> Edits:
        """Each site's weights times the factor, computed in their dtype; none for points."""
        found = selected(self.places)
        return Edits(found if isinstance(found, Sites) else Sites(()), elementwise(live, self._scaled))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """What passes each point times the factor; none for sites."""
        found = selected(self.places)
        return (
            {} if isinstance(found, Sites) else dict.fromkeys(found, lambda values, _: self._scaled(values))
        )

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.factor == 1 else values * self.factor
