"""Patch: put in the activations of another run, or of another model that runs beside this one.

a recording ── aligned ────▶ values at the chosen positions
a lens ─────── Following ──▶ its own pass at each pass of this model ──▶ the same
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from affectlens.checkpoints.vocabulary import compare_words
from affectlens.errors import LensError, NoSuchSite, near
from affectlens.interventions.edits import Places, only_points, set_fields
from affectlens.lens import Activations, Live, Moment, Recording, Rewrite, spread
from affectlens.lens.holding import Running
from affectlens.lens.hooks.places import place_of
from affectlens.lens.hooks.steps import CACHES, held
from affectlens.lens.hooks.widths import refuse_width, width_of
from affectlens.lens.live import answering, encodes, inner
from affectlens.sites import Point, Points, Span


@dataclass(frozen=True, eq=False)
class Patch:
    """Put in what passed each point in another run: activation patching (arXiv 2309.16042, 2404.15255).

    `source` is a recording, of this model on another input or of another model (cross-model patching:
    arXiv 2402.14811), or a lens. The lens's model then runs beside this one on the same inputs, in `generate`
    of a text step by step. Positions are matched in order without padding: the k-th of the point's span here
    gets what passed at the k-th there. What is generated beyond a recording keeps its own activations. Raises
    `LensError` for another kind of source; when it is applied, `NoSuchSite` for a point that was not
    recorded; and in the forward pass, `LensError` where examples or positions of the two runs differ.

    >>> import affectlens as al
    >>> base, tuned, _, tasks = al.load_demo()
    >>> lens, donor, task = al.load(base), al.load(tuned), tasks[0]
    >>> last = lens.sites.where(tower="language", role="down_proj").at("residual", span="last")[-1:]
    >>> recording = donor.record(last, task.examples[0], prompt=task.prompt)
    >>> with lens.intervene(al.Patch(last, source=recording)):
    ...     found = lens.record(last, task.examples[0], prompt=task.prompt)
    >>> found[last[0]].rows.equal(recording[last[0]].rows)
    True
    """

    points: Points
    source: Recording | Live

    def __init__(self, points: Places, *, source: Recording | Live) -> None:
        if not isinstance(source, Recording | Live):
            raise LensError(f"Patch takes a recording or a lens, not a {type(source).__name__}")
        set_fields(self, points=only_points(points, "Patch"), source=source)

    def rewrites(self, lens: Live) -> Mapping[Point, Rewrite]:
        """Return for each point what passed there in the other run."""
        if isinstance(self.source, Live):
            if self.source.model is lens.model:
                raise LensError(
                    "a model can't run beside itself. Record it before: lens.record(points, …), or without "
                    "its adapter: lens.without_adapter().record(points, …)"
                )
            for point in self.points:
                _refuse_unlike(point, lens, self.source)
            beside = Following(self.source, self.points)
            return {point: partial(_followed, point, beside) for point in self.points}
        return {point: _from_recording(point, self.source, lens=lens) for point in self.points}

    def remarks(self, lens: Live) -> Sequence[str]:
        """Return how the tokenizer of the lens that this patches from differs."""
        if not isinstance(self.source, Live):
            return ()
        return tuple(compare_words(lens.checkpoint.tokenizer, self.source.checkpoint.tokenizer).findings)


def _refuse_unlike(point: Point, lens: Live, other: Live) -> None:
    """Raise `LensError` where the other model lacks the point, has another width, or fewer tokens."""
    if point.site.at() not in other.checkpoint.storage:
        raise LensError(f"{point!r}: the model to patch from has no such site; its layers may be fewer")
    if (width := width_of(point, other)) is not None:
        refuse_width(point, lens, width=width, what="the model to patch from")
    here, there = (_words(one) for one in (lens, other))
    if here is not None and there is not None and there < here:
        raise LensError(
            f"the model to patch from knows {there:,} tokens, and this one {here:,}: it would get tokens "
            f"that it does not have"
        )


def _words(lens: Live) -> int | None:
    """Return the number of rows of a model's input embedding."""
    embedding = getattr(inner(answering(lens.model)), "get_input_embeddings", lambda: None)()
    found = getattr(embedding, "num_embeddings", None)
    return found if type(found) is int else None


def _from_recording(
    point: Point, source: Recording, *, lens: Live
) -> Callable[[Tensor, Moment | None], Tensor]:
    known = next((p for p in (point, Point(point.site, point.kind)) if p in source.points), None)
    if known is None:
        raise NoSuchSite(f"{point!r} was not recorded. Recorded: {near(point, source.points)}")
    passed = source[known]
    if not isinstance(passed, Activations):
        raise LensError(f"{point!r}: the recording holds only means; record with keep='values'")
    refuse_width(point, lens, width=passed.values.shape[-1], what="the recording")
    if passed.chosen is None or not place_of(point, model=lens.model, live=lens.checkpoint).positional:
        return _InTurn(point, passed.values)
    # A recording of all positions also serves a span: then positions are matched over all of them.
    return partial(aligned, passed=passed, span=known.span, point=point)


class _InTurn:
    """Give out recorded rows in order, for a module without positions of the text.

    A tower may be called several times in a pass, once for each picture: each call takes the next rows.
    """

    def __init__(self, point: Point, passed: Tensor) -> None:
        self._point, self._passed, self._next = point, passed, 0

    def begin(self) -> None:
        """Start another pass from the first row; raise `LensError` if the last pass left rows over."""
        if self._next:
            raise LensError(
                f"{self._point!r}: {self._next} rows passed, but {len(self._passed)} were recorded"
            )

    def __call__(self, values: Tensor, moment: Moment | None) -> Tensor:
        start, stop = self._next, self._next + len(values)
        found = self._passed[start:stop]
        if found.shape != values.shape:
            there = (len(self._passed) - start, *self._passed.shape[1:])
            raise LensError(
                f"{self._point!r}: shape {tuple(values.shape)} passes there, but {there} was recorded"
            )
        self._next = stop if stop < len(self._passed) else 0
        return found.clone()  # a model may write into it


class Following:
    """Run `lens` once at each moment of another model's passes, with a cache of its own in `generate`."""

    def __init__(self, lens: Live, points: Points) -> None:
        # Recorded at all positions: those of a span are chosen where they are put in.
        self._lens = lens
        self._places = Points(_everywhere(point) for point in points)
        self._call: object = None  # arguments of the pass that was run last; another object, another pass
        self._cache: Any = None
        self._passed: dict[Point, Tensor] = {}

    def at(self, point: Point, moment: Moment) -> Tensor:
        """Return what passes a point of the other model at this moment, (batch, position, feature)."""
        if moment.call is not self._call:
            self._run(moment)
            self._call = moment.call
        return self._passed[_everywhere(point)]

    def _reorder_with(self, cache: Any) -> None:
        """Reorder the other model's cache too whenever a beam search reorders this one's."""
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
            raise LensError(
                "the encoder and the decoder run one after the other here, so the other model can't follow; "
                "patch from a recording"
            )
        if not moment.whole:
            raise LensError(
                "a part of the model was called by itself, so the other can't follow; call the whole model"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim > 2):
            raise LensError(
                "the mask of this call fits one cache, and the other model has another one; generate with a "
                "dynamic cache"
            )
        if kwargs.get("mm_encoder_outputs") is not None:
            raise LensError(
                "generate has already encoded pictures and sounds with this model, so the other one can't "
                "see them; patch from a recording of what the other generates, or compare logits"
            )
        start = moment.start - moment.skipped
        if start and (moment.begins or self._cache is None):
            raise LensError(
                "the other model has not seen what is in the cache, so it can't continue from there; "
                "run both from the first token"
            )
        if moment.begins:
            self._cache = None
            self._reorder_with(kwargs.get("past_key_values"))
        elif hasattr(self._cache, "crop") and start < (there := held(self._cache, None) or 0):
            # The followed model went back to score another answer to the same prompt.
            self._cache.crop(start - there)
        own = {name: self._cache if name in CACHES else value for name, value in kwargs.items()}
        with torch.no_grad(), Running(self._lens), Recording(self._lens, self._places) as recording:
            out = inner(answering(self._lens.model))(**own)
        self._cache = next((out[name] for name in CACHES if out.get(name) is not None), None)
        for point in self._places:
            passed = recording[point]
            assert isinstance(passed, Activations)
            self._passed[point] = passed.values


def _everywhere(point: Point) -> Point:
    return Point(point.site, point.kind)


def _followed(point: Point, beside: Following, values: Tensor, moment: Moment | None) -> Tensor:
    if moment is None:
        raise LensError(f"{point!r} has no positions of the text; patch it from a recording")
    return beside.at(point, moment).to(device=values.device, dtype=values.dtype, copy=True)


def aligned(
    values: Tensor, moment: Moment | None, *, passed: Activations, span: Span, point: Point
) -> Tensor:
    """Return the values with those of a span replaced by what passed there, position by position."""
    theirs = passed.values.to(device=values.device, dtype=values.dtype)
    if moment is None or passed.chosen is None or values.shape[:2] != (len(moment.own), moment.length):
        raise LensError(
            f"{point!r}: shape {tuple(values.shape)} passes there, which does not fit the recorded positions"
        )
    here, there = moment.so_far(span).to(values.device), passed.chosen.to(values.device)
    if len(here) != len(there):
        raise LensError(f"{point!r}: {len(here)} examples run, but {len(there)} were recorded")
    alike = moment.begins and span is None and theirs.shape == values.shape and here.shape == there.shape
    if alike and bool((here == there).all()):
        return theirs.clone()  # with the padding's values, so that it is the other run to the bit
    if moment.start < moment.own.shape[1] <= moment.end:  # the prompt is whole
        _refuse_uneven(moment.of_prompt(here), there, point=point, span=span)
    number = (here.cumsum(1) - 1)[:, moment.start :]
    # The recorded positions that were chosen come first in each row, in their order.
    order = torch.sort((~there).byte(), dim=1, stable=True).indices
    known = here[:, moment.start :] & (number < there.sum(1, keepdim=True))
    row = torch.arange(len(here), device=values.device)[:, None]
    found = theirs[row, order[row, number.clamp(0, order.shape[1] - 1)]]
    return torch.where(spread(known, values), found, values)


def _refuse_uneven(here: Tensor, there: Tensor, *, point: Point, span: Span) -> None:
    """Raise `LensError` where positions can't be matched.

    Of a span the counts have to be equal. Of all positions more may have been recorded, such as a
    generated continuation.
    """
    for number, (ours, theirs) in enumerate(zip(here.sum(1).tolist(), there.sum(1).tolist(), strict=True)):
        if ours > theirs or (span is not None and ours != theirs):
            raise LensError(
                f"{point!r}: example {number} has {ours} positions there, but {theirs} were recorded"
            )
