"""Mean and Resample: take away what an input says at a point, and leave what is usual there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.errors import LensError
from affectlens.interventions.edits import Places, finite, keep, only_points, only_sites
from affectlens.lens import Activations, Lens, Moment, Recording, Rewrite, without
from affectlens.sites import Point, Points, Site, Sites, Span
from affectlens.tasks import Example

Over = Recording | Iterable[Example]


@dataclass(frozen=True, eq=False)
class Mean:
    """Replace activations by their mean over examples: mean ablation.

    `over` are examples, run by the model as it then is with `prompt`, or a recording of these points. The
    mean is over all positions of the point's span. Unlike zeros, it keeps the model where it usually works
    (arXiv 2309.16042, section 2).
    """

    points: Points
    over: Recording | tuple[Example, ...]
    prompt: str

    def __init__(self, points: Places, *, over: Over, prompt: str = "{text}") -> None:
        keep(self, points=only_points(points, "Mean"), over=_kept(over), prompt=prompt)

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """The mean of each point, whatever passes."""
        found = _recorded(lens, self.points, self.over, prompt=self.prompt, keeping="mean")
        return {point: _always(found[point].mean) for point in self.points}


@dataclass(frozen=True, eq=False)
class Resample:
    """Replace activations by others that occur at the point: resample ablation.

    Each chosen position gets what passed at a random position of `over`, drawn by `seed`, the same one at all
    points. `over` is as for `Mean`.
    """

    points: Points
    over: Recording | tuple[Example, ...]
    seed: int
    prompt: str

    def __init__(self, points: Places, *, over: Over, seed: int = 0, prompt: str = "{text}") -> None:
        keep(self, points=only_points(points, "Resample"), over=_kept(over), seed=seed, prompt=prompt)

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """Draws from what was recorded at each point."""
        found = _recorded(lens, self.points, self.over, prompt=self.prompt, keeping="values")
        drawn = {}
        for point in self.points:
            passed = found[point]
            if not isinstance(passed, Activations) or not len(passed.rows):
                raise LensError(f"{point!r}: nothing passed there that could be drawn from")
            drawn[point] = _draws(passed.rows, self.seed)
        return drawn


def _kept(over: Over) -> Recording | tuple[Example, ...]:
    return over if isinstance(over, Recording) else tuple(over)


def _recorded(lens: Lens, points: Points, over: Over, *, prompt: str, keeping: str) -> Recording:
    return over if isinstance(over, Recording) else lens.record(points, *over, prompt=prompt, keep=keeping)


def _always(mean: Float[Tensor, " feature"]) -> Callable[[Tensor, Moment | None], Tensor]:
    return lambda values, _: mean.to(values).expand_as(values).clone()


def _draws(rows: Float[Tensor, "row feature"], seed: int) -> Callable[[Tensor, Moment | None], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(values: Tensor, moment: Moment | None) -> Tensor:
        index = torch.randint(len(rows), values.shape[:-1], generator=generator)
        return rows.to(values.device)[index.to(values.device)]

    return draw


@dataclass(frozen=True)
class Knockout:
    """Cut attention from the positions of `target` to those of `source`, in the layers of `sites`.

    `Knockout(sites.where(role="o_proj", layer=range(9)), source="image", target="last")`: for nine layers the
    last token does not see the picture (arXiv 2304.14767). A position never loses sight of itself, so no
    softmax is over nothing. Any attention site of a layer stands for its attention; where a decoder attends
    to its encoder, `source` is of the encoder's tokens. Raises `LensError` for an attention that takes no
    mask of queries and keys.
    """

    sites: Sites
    source: Span
    target: Span

    def __init__(self, sites: Places, *, source: Span, target: Span) -> None:
        chosen = only_sites(sites, "Knockout")
        # `at` refuses an unknown span here, before a block is entered.
        source, target = (chosen.at("residual", span=span)[0].span for span in (source, target))
        keep(self, sites=chosen, source=source, target=target)

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """The mask of each attention without these pairs."""
        return {Point(site, "attention"): partial(self._cut, site) for site in self.sites}

    def _cut(self, site: Site, mask: Tensor, moment: Moment | None) -> Tensor:
        if moment is None:
            raise LensError(f"{site}: the {site.tower} tower has no positions of the text to cut")
        keys, queries = (moment.across or moment).so_far(self.source), moment.chosen(self.target)
        blocked = queries[:, :, None] & keys[:, None, moment.first_key :]
        if moment.across is None:
            behind = moment.start - moment.first_key
            blocked = blocked & ~torch.ones_like(blocked[0]).triu(behind).tril(behind)
        return without(mask, blocked) if bool(blocked.any()) else mask


@dataclass(frozen=True, eq=False)
class Steer:
    """Add alpha · `vector` to what passes each point (arXiv 2308.10248); alpha 0 changes nothing.

    `vector` is (feature,), e.g. the difference of the means of two recordings at the point: what tuning adds
    on average (arXiv 2510.13900). Raises `LensError` where it has another width than what passes.
    """

    points: Points
    vector: Float[Tensor, " feature"]
    alpha: float

    def __init__(
        self,
        points: Places,
        *,
        vector: Float[Tensor, " feature"] | Sequence[float],
        alpha: float = 1.0,
    ) -> None:
        chosen = only_points(points, "Steer")
        keep(self, points=chosen, vector=torch.as_tensor(vector), alpha=finite("alpha", alpha))

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """What passes, and the vector."""
        return dict.fromkeys(self.points, self._steered)

    def _steered(self, values: Tensor, moment: Moment | None) -> Tensor:
        if self.alpha == 0:
            return values
        if self.vector.shape != values.shape[-1:]:
            raise LensError(
                f"a vector of {tuple(self.vector.shape)} can't be added to {values.shape[-1]} features"
            )
        return values + (self.alpha * self.vector).to(device=values.device, dtype=values.dtype)
