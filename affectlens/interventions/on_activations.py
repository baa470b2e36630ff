"""Mean, Resample, Knockout and Steer: change what passes a point while the model runs.

Mean and Resample take away what an input says there and leave what is usual; Knockout cuts attention; Steer
adds a direction.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.errors import LensError
from affectlens.interventions.edits import Places, finite, only_points, only_sites, set_fields
from affectlens.lens import Activations, Live, Moment, Recording, Rewrite, record, without
from affectlens.lens.hooks.widths import refuse_width
from affectlens.sites import Point, Points, Site, Sites, Span
from affectlens.tasks import Example

Over = Recording | Iterable[Example]


@dataclass(frozen=True, eq=False)
class Mean:
    """Replace activations by their mean over examples: mean ablation.

    `over` is a recording of these points, or examples: the model, as it is when the block is entered, then
    runs them with `prompt`. The mean is over all positions of the point's span. Unlike zeros, it keeps the
    model where it usually works (arXiv 2309.16042, section 2).

    >>> import affectlens as al
    >>> base, _, _, tasks = al.load_demo()
    >>> lens, task = al.load(base), tasks[0]
    >>> points = lens.sites.where(tower="language", role="down_proj").at("output", span="image")
    >>> with lens.intervene(al.Mean(points, over=task.examples[:4], prompt=task.prompt)):
    ...     logits = lens.logits(task.examples[5], prompt=task.prompt)
    >>> logits.equal(lens.logits(task.examples[5], prompt=task.prompt))
    False
    """

    points: Points
    over: Recording | tuple[Example, ...]
    prompt: str

    def __init__(self, points: Places, *, over: Over, prompt: str = "{text}") -> None:
        set_fields(self, points=only_points(points, "Mean"), over=_kept(over), prompt=prompt)

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return for each point its mean, whatever passes."""
        found = _recorded(lens, self.points, self.over, prompt=self.prompt, keep="mean")
        means = {point: found[point].mean for point in self.points}
        for point, mean in means.items():
            _refuse_unfit(point, mean, lens=lens, what="the mean")
        return {point: _always(mean) for point, mean in means.items()}


@dataclass(frozen=True, eq=False)
class Resample:
    """Replace activations by others that occur at the point: resample ablation.

    Each position gets what passed at a random position of `over`, drawn by `seed`, and the same position at
    all points. `over` and `prompt` are those of `Mean`.

    >>> import affectlens as al
    >>> base, _, _, tasks = al.load_demo()
    >>> lens, task = al.load(base), tasks[0]
    >>> points = lens.sites.where(tower="language", role="down_proj").at("output", span="last")
    >>> resampled = al.Resample(points, over=task.examples[:4], prompt=task.prompt, seed=1)
    >>> with lens.intervene(resampled):
    ...     logits = lens.logits(task.examples[5], prompt=task.prompt)
    >>> logits.equal(lens.logits(task.examples[5], prompt=task.prompt))
    False
    """

    points: Points
    over: Recording | tuple[Example, ...]
    seed: int
    prompt: str

    def __init__(self, points: Places, *, over: Over, seed: int = 0, prompt: str = "{text}") -> None:
        chosen = only_points(points, "Resample")
        set_fields(self, points=chosen, over=_kept(over), seed=seed, prompt=prompt)

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return for each point draws from what was recorded there."""
        found = _recorded(lens, self.points, self.over, prompt=self.prompt, keep="values")
        drawn = {}
        for point in self.points:
            passed = found[point]
            if not isinstance(passed, Activations) or not len(passed.rows):
                raise LensError(f"{point!r}: nothing was recorded there to draw from; give other examples")
            _refuse_unfit(point, passed.rows, lens=lens, what="what was recorded")
            drawn[point] = _draws(passed.rows, self.seed)
        return drawn


@dataclass(frozen=True)
class Knockout:
    """Cut attention from the positions of `target` to those of `source`, in the layers of `sites`.

    The method is attention knockout (arXiv 2304.14767). Any attention site of a layer selects the layer's
    attention, and `site.at(head=3)` that head of it. A position always sees itself, so that no softmax is
    over nothing. Where a decoder attends to its encoder, `source` is of the encoder's tokens. Raises
    `NoSuchSite` for an unknown span, and `LensError`, when it is applied, for an attention that takes no mask
    of queries and keys.

    >>> import affectlens as al
    >>> lens = al.load(al.load_demo().base)
    >>> attention = lens.sites.where(tower="language", role="o_proj")
    >>> blind = al.Knockout(attention, source="image", target="last")  # the last token sees no picture
    >>> next(iter(blind.rewrites(lens)))
    language.0.o_proj@attention
    """

    sites: Sites
    source: Span
    target: Span

    def __init__(self, sites: Places, *, source: Span, target: Span) -> None:
        chosen = only_sites(sites, "Knockout")
        # `at` raises here for an unknown span, and not in the middle of a block.
        source, target = (chosen.at("residual", span=span)[0].span for span in (source, target))
        set_fields(self, sites=chosen, source=source, target=target)

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return for each attention its mask without the pairs that are cut."""
        return {Point(site, "attention"): partial(self._cut, site) for site in self.sites}

    def _cut(self, site: Site, mask: Tensor, moment: Moment | None) -> Tensor:
        if moment is None:
            raise LensError(f"{site}: the {site.tower} tower has no positions of the text to cut")
        keys, queries = (moment.across or moment).so_far(self.source), moment.chosen(self.target)
        blocked = queries[:, :, None] & keys[:, None, moment.first_key :]
        if moment.across is None:
            # The diagonal on which a query meets its own key: queries begin at `start`, keys at `first_key`.
            behind = moment.start - moment.first_key
            blocked = blocked & ~torch.ones_like(blocked[0]).triu(behind).tril(behind)
        return without(mask, blocked) if bool(blocked.any()) else mask


@dataclass(frozen=True, eq=False)
class Steer:
    """Add alpha · `vector` to what passes each point (arXiv 2308.10248); alpha 0 changes nothing.

    `vector` is (feature,), such as the difference of two recorded means at the point: what tuning adds on
    average (arXiv 2510.13900). Raises `LensError` for an `alpha` that is not finite, and in the forward pass
    where the vector's width differs from what passes.

    >>> import affectlens as al
    >>> lens = al.load(al.load_demo().base)
    >>> point = lens.sites.where(tower="language", role="down_proj").at("residual", span="last")[1]
    >>> al.Steer(point, vector=[0.5] * 128, alpha=2.0).vector.shape
    torch.Size([128])
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
        found = torch.as_tensor(vector)
        if not bool(torch.isfinite(found).all()):
            raise LensError("the vector of Steer holds NaN or infinity")
        set_fields(self, points=chosen, vector=found, alpha=finite("alpha", alpha))

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return for each point the sum of what passes and the vector."""
        for point in self.points if self.vector.ndim == 1 else ():
            refuse_width(point, lens, width=len(self.vector), what="the vector")
        return dict.fromkeys(self.points, self._steered)

    def _steered(self, values: Tensor, moment: Moment | None) -> Tensor:
        if self.alpha == 0:
            return values
        if self.vector.shape != values.shape[-1:]:
            there = f"{values.shape[-1]} features pass the point"
            raise LensError(f"a vector of shape {tuple(self.vector.shape)} can't be added: {there}")
        new = values + (self.alpha * self.vector).to(device=values.device, dtype=values.dtype)
        if bool((new.isinf() & ~values.isinf()).any()):
            name, most = str(values.dtype).removeprefix("torch."), torch.finfo(values.dtype).max
            raise LensError(
                f"adding alpha · vector goes beyond the largest number of {name}, {most:,.5g}: alpha is "
                f"{self.alpha:g}, the largest entry of the vector {float(self.vector.abs().max()):g}"
            )
        return new


def _kept(over: Over) -> Recording | tuple[Example, ...]:
    return over if isinstance(over, Recording) else tuple(over)


def _recorded(
    lens: Live, points: Points, over: Recording | tuple[Example, ...], *, prompt: str, keep: str
) -> Recording:
    if isinstance(over, Recording):
        return over
    return record(Recording(lens, points, keep=keep), lens, examples=over, prompt=prompt)


def _refuse_unfit(point: Point, values: Tensor, *, lens: Live, what: str) -> None:
    """Raise `LensError` for values of another width than passes a point, and for NaN or infinity."""
    refuse_width(point, lens, width=values.shape[-1], what=what)
    if not bool(torch.isfinite(values).all()):
        raise LensError(f"{point!r}: {what} holds NaN or infinity")


def _always(mean: Float[Tensor, " feature"]) -> Callable[[Tensor, Moment | None], Tensor]:
    # Cloned, since a model may write into what it is given.
    return lambda values, _: mean.to(values).expand_as(values).clone()


def _draws(rows: Float[Tensor, "row feature"], seed: int) -> Callable[[Tensor, Moment | None], Tensor]:
    # One generator a point, of one seed: all points then draw the same positions.
    generator = torch.Generator().manual_seed(seed)

    def draw(values: Tensor, moment: Moment | None) -> Tensor:
        index = torch.randint(len(rows), values.shape[:-1], generator=generator)
        return rows.to(values.device)[index.to(values.device)]

    return draw
