"""Patch: activations of another run, or of another model's run, in place of one's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from affectlens.errors import LensError, NoSuchSite, near
from affectlens.interventions.edits import Places, keep, only_points
from affectlens.lens import Activations, Lens, Moment, Recording, Rewrite, spread
from affectlens.lens.live import answering, encodes, inner
from affectlens.sites import Point, Points, Span


@dataclass(frozen=True, eq=False)
class Patch:
    """Put what passed in another run at each point (activation patching: arXiv 2309.16042, 2404.15255).

    `source` is a recording, of this model on another input or of another model (cross-model patching:
    arXiv 2402.14811), or a lens: that model is then run beside this one on whatever this one is given, in
    `generate` of a text step by step. Positions are matched in order, padding aside: the k-th of the point's
    span here gets what passed at the k-th there. What is generated beyond a recording keeps its own
    activations. Raises `NoSuchSite` for a point that was not recorded, `LensError` where rows or positions of
    the two runs differ.
    """

    points: Points
    source: Recording | Lens

    def __init__(self, points: Places, *, source: Recording | Lens) -> None:
        if not isinstance(source, Recording | Lens):
            raise LensError(f"Patch takes a recording or a lens, not a {type(source).__name__}")
        keep(self, points=only_points(points, "Patch"), source=source)

    def rewrites(self, lens: Lens) -> Mapping[Point, Rewrite]:
        """What passed at each point in the other run."""
        if isinstance(self.source, Lens):
            if self.source.model is lens.model:
                raise LensError("a model can't be run beside itself; patch it from a recording")
            beside = Following(self.source, self.points)
            return {point: partial(_followed, point, beside) for point in self.points}
        return {point: _patched(point, self.source) for point in self.points}


def _patched(point: Point, source: Recording) -> Callable[[Tensor, Moment | None], Tensor]:
    known = next((p for p in (point, Point(point.site, point.kind)) if p in source.points), None)
    if known is None:
        raise NoSuchSite(f"{point!r} was not recorded. Recorded: {near(point, source.points)}")
    passed = source[known]
    if not isinstance(passed, Activations):
        raise LensError(f"{point!r}: only means were recorded; record with keep='values'")
    if passed.chosen is None:
        return _InTurn(point, passed.values)
    # Recorded everywhere and patched in a span: then positions are matched over all.
    return partial(aligned, passed=passed, span=known.span, point=point)


class _InTurn:
    """What passed a module without positions of the text, which may be called several times in a pass."""

    def __init__(self, point: Point, passed: Tensor) -> None:
        self._point, self._passed, self._next = point, passed, 0

    def begin(self) -> None:
        """Another pass: what was recorded is put from its first row on."""
        if self._next:
            raise LensError(f"{self._point!r}: {self._next} rows passed, {len(self._passed)} were recorded")

    def __call__(self, values: Tensor, moment: Moment | None) -> Tensor:
        start, stop = self._next, self._next + len(values)
        found = self._passed[start:stop]
        if found.shape != values.shape:
            there = (len(self._passed) - start, *self._passed.shape[1:])
            raise LensError(f"{self._point!r}: {tuple(values.shape)} passes there, {there} was recorded")
        self._next = stop if stop < len(self._passed) else 0
        return found.clone()  # a model may write into it


class Following:
    """Run `lens` once at each moment of another model's passes, with a cache of its own in `generate`."""

    def __init__(self, lens: Lens, points: Points) -> None:
        # All positions: those of a span are chosen where they are put.
        self._lens, self._points = lens, points
        self._places = Points({point: type(point)(point.site, point.kind) for point in points}.values())
        self._call: object = None
        self._cache: Any = None
        self._passed: dict[Any, Tensor] = {}

    def at(self, point: Any, moment: Moment) -> Tensor:
        """What passes a point of the other model at this moment, (batch, position, feature)."""
        if moment.call is not self._call:
            self._run(moment)
            self._call = moment.call
        return self._passed[type(point)(point.site, point.kind)]

    def _reorder_with(self, cache: Any) -> None:
        """Let a search that exchanges the rows of this model's cache exchange those of the other's too."""
        if cache is None or not hasattr(cache, "reorder_cache"):
            return
        exchange = cache.reorder_cache

        def both(rows: Tensor) -> None:
            exchange(rows)
            if self._cache is not None:
                self._cache.reorder_cache(rows)

        cache.reorder_cache = both

    def _run(self, moment: Moment) -> None:
        kwargs = moment.call
        if moment.blind:
            raise LensError(moment.blind)
        alone = "decoder_input_ids" not in kwargs or kwargs.get("encoder_outputs") is not None
        if encodes(self._lens.model) and alone:
            raise LensError("an encoder and a decoder are run one by one here; patch from a recording")
        if kwargs.get("mm_encoder_outputs") is not None:
            raise LensError(
                "generate has encoded pictures and sounds by this model before, so the other one can't see "
                "them; patch from a recording of what the other generates, or compare logits"
            )
        if moment.start and (moment.begins or self._cache is None):
            raise LensError("the other model has not seen what is in the cache, so it can't go on from it")
        if moment.begins:
            self._cache = None
            self._reorder_with(kwargs.get("past_key_values"))
        own = {**kwargs, "past_key_values": self._cache} if "past_key_values" in kwargs else dict(kwargs)
        with torch.no_grad(), Recording(self._lens, self._places) as recording:
            out = inner(answering(self._lens.model))(**own)
        self._cache = getattr(out, "past_key_values", None)
        for point in self._places:
            passed = recording[point]
            assert isinstance(passed, Activations)
            self._passed[point] = passed.values


def _followed(point: Point, beside: Following, values: Tensor, moment: Moment | None) -> Tensor:
    if moment is None:
        raise LensError(f"{point!r} has no positions of the text; patch it from a recording")
    return beside.at(point, moment).to(device=values.device, dtype=values.dtype, copy=True)


def aligned(
    values: Tensor, moment: Moment | None, *, passed: Activations, span: Span, point: Point
) -> Tensor:
    """The values, and instead of those of a span what passed there, position by position."""
    theirs = passed.values.to(device=values.device, dtype=values.dtype)
    if moment is None or passed.chosen is None or values.shape[:2] != (len(moment.own), moment.length):
        raise LensError(
            f"{point!r}: what passes there, {tuple(values.shape)}, has not the recorded positions"
        )
    here, there = moment.so_far(span).to(values.device), passed.chosen.to(values.device)
    if len(here) != len(there):
        raise LensError(f"{point!r}: {len(here)} examples are run, {len(there)} were recorded")
    alike = moment.begins and span is None and theirs.shape == values.shape and here.shape == there.shape
    if alike and bool((here == there).all()):
        return theirs.clone()  # padding too: then it is the other run to the bit
    if moment.begins:
        _refuse_uneven(here[:, : moment.own.shape[1]], there, point=point, span=span)
    number = (here.cumsum(1) - 1)[:, moment.start :]
    # The chosen of each row first, in their order.
    order = torch.sort((~there).byte(), dim=1, stable=True).indices
    known = here[:, moment.start :] & (number < there.sum(1, keepdim=True))
    row = torch.arange(len(here), device=values.device)[:, None]
    found = theirs[row, order[row, number.clamp(0, order.shape[1] - 1)]]
    return torch.where(spread(known, values), found, values)


def _refuse_uneven(here: Tensor, there: Tensor, *, point: Point, span: Span) -> None:
    """Raise `LensError` where positions can't be matched; of all positions, more may have been recorded."""
    for number, (ours, theirs) in enumerate(zip(here.sum(1).tolist(), there.sum(1).tolist(), strict=True)):
        if ours > theirs or (span is not None and ours != theirs):
            raise LensError(
                f"{point!r}: example {number} has {ours} positions there, and {theirs} were recorded of it"
            )
