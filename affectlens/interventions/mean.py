"""Mean and Resample: take away what an input says at a point, and leave what is usual there."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.errors import LensError
from affectlens.interventions.selecting import Places, only_points
from affectlens.lens import Activations, Lens, Moment, Recording, Rewrite
from affectlens.sites import Point, Points
from affectlens.tasks import Example

Over = Recording | Iterable[Example]


@dataclass(frozen=True, eq=False)
class Mean:
    """Replace activations by their mean over examples: mean ablation.

    `over` are examples, run by the model as it then is with `prompt`, or a recording of these points. The
    mean is over all positions of the point's span. Unlike zeros, it keeps the model where it usually works
    (arXiv 2309.16042, section 2).
    """

    points: Places
    over: Over = field(kw_only=True)
    prompt: str = field(default="{text}", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", only_points(self.points, "Mean"))
        object.__setattr__(self, "over", _kept(self.over))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """The mean of each point, whatever passes."""
        points = only_points(self.points, "Mean")
        found = _recorded(lens, points, self.over, prompt=self.prompt, keep="mean")
        return {point: _always(found[point].mean) for point in points}


@dataclass(frozen=True, eq=False)
class Resample:
    """Replace activations by others that occur at the point: resample ablation.

    Each chosen position gets what passed at a random position of `over`, drawn by `seed`, the same one at all
    points. `over` is as for `Mean`.
    """

    points: Places
    over: Over = field(kw_only=True)
    seed: int = field(default=0, kw_only=True)
    prompt: str = field(default="{text}", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", only_points(self.points, "Resample"))
        object.__setattr__(self, "over", _kept(self.over))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """Draws from what was recorded at each point."""
        points = only_points(self.points, "Resample")
        found = _recorded(lens, points, self.over, prompt=self.prompt, keep="values")
        drawn = {}
        for point in points:
            passed = found[point]
            if not isinstance(passed, Activations) or not len(passed.rows):
                raise LensError(f"{point!r}: nothing passed there that could be drawn from")
            drawn[point] = _draws(passed.rows, self.seed)
        return drawn


def _kept(over: Over) -> Over:
    return over if isinstance(over, Recording) else tuple(over)


def _recorded(lens: Lens, points: Points, over: Over, *, prompt: str, keep: str) -> Recording:
    return over if isinstance(over, Recording) else lens.record(points, *over, prompt=prompt, keep=keep)


def _always(mean: Float[Tensor, " feature"]) -> Callable[[Tensor, Moment | None], Tensor]:
    return lambda values, _: mean.to(values).expand_as(values).clone()


def _draws(rows: Float[Tensor, "row feature"], seed: int) -> Callable[[Tensor, Moment | None], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(values: Tensor, moment: Moment | None) -> Tensor:
        index = torch.randint(len(rows), values.shape[:-1], generator=generator)
        return rows.to(values.device)[index.to(values.device)]

    return draw
