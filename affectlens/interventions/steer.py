"""Steer: push activations along a direction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.errors import LensError
from affectlens.interventions.selecting import Places, finite, only_points
from affectlens.lens import Lens, Moment, Rewrite
from affectlens.sites import Point


@dataclass(frozen=True, eq=False)
class Steer:
    """Add alpha · `vector` to what passes each point (arXiv 2308.10248); alpha 0 changes nothing.

    `vector` is (feature,), e.g. the difference of the means of two recordings at the point: what tuning adds
    on average (arXiv 2510.13900). Raises `LensError` where it has another width than what passes.
    """

    points: Places
    vector: Float[Tensor, " feature"] | Sequence[float] = field(kw_only=True)
    alpha: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", only_points(self.points, "Steer"))
        object.__setattr__(self, "vector", torch.as_tensor(self.vector))
        finite("alpha", self.alpha)

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """What passes, and the vector."""
        return dict.fromkeys(only_points(self.points, "Steer"), self._steered)

    def _steered(self, values: Tensor, moment: Moment | None) -> Tensor:
        if self.alpha == 0:
            return values
        assert isinstance(self.vector, Tensor)
        if self.vector.shape != values.shape[-1:]:
            raise LensError(
                f"a vector of {tuple(self.vector.shape)} can't be added to {values.shape[-1]} features"
            )
        return values + (self.alpha * self.vector).to(device=values.device, dtype=values.dtype)
