"""Mean and Resample: take away what an input says at a point, and leave what is usual there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.errors import LensError
from affectlens.interventions.edits import Places, finite, only_points, only_sites
from affectlens.lens import Activations, Live, Moment, Recording, Rewrite, record, without
from affectlens.sites import Point, Points, Site, Span
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

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
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

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
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


def _recorded(lens: Live, points: Points, over: Over, *, prompt: str, keep: str) -> Recording:
    if isinstance(over, Recording):
        return over
    return record(Recording(lens, points, keep=keep), lens, examples=list(over), prompt=prompt)


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

    sites: Places
    source: Span = field(kw_only=True)
    target: Span = field(kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", only_sites(self.sites, "Knockout"))
        for end in ("source", "target"):  # an unknown span is told here
            found = only_sites(self.sites, "Knockout").at("residual", span=getattr(self, end))
            object.__setattr__(self, end, found[0].span)

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """The mask of each attention without these pairs."""
        sites = only_sites(self.sites, "Knockout")
        return {Point(site, "attention"): partial(self._cut, site) for site in sites}

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

    points: Places
    vector: Float[Tensor, " feature"] | Sequence[float] = field(kw_only=True)
    alpha: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", only_points(self.points, "Steer"))
        object.__setattr__(self, "vector", torch.as_tensor(self.vector))
        finite("alpha", self.alpha)

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
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
