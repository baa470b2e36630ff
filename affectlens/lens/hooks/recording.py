"""Record the activations at some points: the values, with gradients if asked, or running moments.

points ──▶ hooks that keep what passes ──▶ Recording: point → Activations | Statistics
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affectlens import html
from affectlens.errors import LensError, NoSuchSite, near
from affectlens.lens.holding import Running, hold
from affectlens.lens.hooks.activations import Activations, Statistics, joined, of_span
from affectlens.lens.hooks.hooking import Hook
from affectlens.lens.hooks.layouts import learn
from affectlens.lens.hooks.media_padding import MediaPadding
from affectlens.lens.hooks.moments import Moments
from affectlens.lens.hooks.places import HEAD_NORMS, Place, place_of
from affectlens.lens.hooks.positions import OTHER_MASK, Moment
from affectlens.lens.hooks.recomputing import NO_GRADIENTS, reentrant
from affectlens.lens.inputs.batching import batches
from affectlens.lens.inputs.row_ends import row_ends, text_mask
from affectlens.lens.live import Live, encodes, refuse_compiled, tokenizer_of
from affectlens.lens.restoring import Swaps, atomic, raise_waiting
from affectlens.lens.running import forward
from affectlens.sites import Point, Points
from affectlens.tasks import Example

KEPT = ("values", "mean", "second")
Metric = Callable[[Float[Tensor, "batch vocabulary"]], Tensor]


class Recording:
    """The activations of each point, by point: a mapping from `Point` to `Activations` or `Statistics`.

    `lens.record` makes it and fills it with examples; without examples, a `with` block fills it. Raises
    `LensError` for a point that no hook can see, and for an unknown `keep`.
    """

    def __init__(self, lens: Live, points: Points, *, keep: str = "values", gradients: bool = False) -> None:
        if keep not in KEPT:
            raise LensError(f"can't record with keep={keep!r}. Known: {near(keep, KEPT)}")
        if not points:
            raise NoSuchSite("the selection has no points to record; select some sites")
        if gradients and keep != "values":
            raise LensError(f"gradients need the values: use keep='values', not {keep!r}")
        self.points = points
        self._keep, self._gradients = keep, gradients
        # Dropped at the end of the block, so that a recording does not keep the model in memory.
        self._model: nn.Module | None = lens.model
        self._off = lens.adapters_off
        self._known = weakref.ref(lens.model)
        self._tokenizer = tokenizer_of(lens.processor)
        self._padding: MediaPadding | None = None
        self._passed: dict[Point, list[list[Activations]]] = {point: [] for point in points}
        self._statistics = {point: Statistics() for point in points}
        self._waiting: list[tuple[Activations, Tensor, Tensor | None]] = []
        self._swaps = Swaps()
        self._places = {point: place_of(point, model=lens.model, live=lens.checkpoint) for point in points}

    @atomic
    def __enter__(self) -> "Recording":
        self._swaps.open()
        try:
            model = self._known()
            if model is None:
                raise LensError("the model of this recording is gone; make a new recording with lens.record")
            refuse_compiled(model)
            hold(self._swaps, model, adapters_off=self._off)
            norms = [place for point, place in self._places.items() if point.site.role in HEAD_NORMS]
            learn(model, norms)
            moments = Moments(model, self._tokenizer)
            moments.follow(self._swaps)
            for point, place in self._places.items():
                hook = Hook(point, place, self._keeper(point), moments, records=True)
                self._swaps.hook(model.get_submodule(place.module), hook, side=hook.side)
            # After the hooks that record, since it forgets a call when the module is left.
            self._padding = MediaPadding(model, filter(_of_media, self._places.values()))
            self._padding.follow(self._swaps)
            raise_waiting()
        except BaseException:
            self._swaps.undo()
            raise
        return self

    @atomic
    def __exit__(self, *_: object) -> None:
        self._swaps.undo()
        self._model = self._padding = None

    def differentiate(self, metric: Tensor) -> None:
        """Compute the gradients of a metric's sum at the activations since the last call."""
        if not isinstance(metric, Tensor) or not metric.requires_grad:
            raise LensError("the metric does not depend on the logits, so its gradient is undefined")
        found = torch.autograd.grad(metric.sum(), [kept for _, kept, _ in self._waiting], allow_unused=True)
        for (passed, kept, chosen), gradient in zip(self._waiting, found, strict=True):
            whole = torch.zeros_like(kept) if gradient is None else gradient
            passed.gradients = whole if chosen is None else of_span(whole, chosen).values
        self._waiting.clear()

    def _keeper(self, point: Point) -> Callable[[Tensor, Moment | None], Tensor]:
        return partial(self._keep_values if self._keep == "values" else self._add, point)

    def _keep_values(self, point: Point, values: Tensor, moment: Moment | None) -> Tensor:
        passed, chosen = self._seen(point, values.detach(), moment)
        batches = self._passed[point]
        if moment is None or moment.begins or not batches:
            batches.append([])
        batches[-1].append(passed)
        if not self._gradients:
            return values
        if reentrant():
            raise LensError(f"{point!r}: {NO_GRADIENTS}")
        # The copy that goes on belongs to this point alone. Other modules may read the original too, and
        # their gradient would be added.
        kept = values.clone() if values.requires_grad else values.detach().clone().requires_grad_()
        self._waiting.append((passed, kept, chosen))
        return kept.clone()  # a model may write into it in place

    def _add(self, point: Point, values: Tensor, moment: Moment | None) -> Tensor:
        passed, _ = self._seen(point, values.detach(), moment)
        self._statistics[point].add(passed.rows, products=self._keep == "second")
        return values

    def _seen(self, point: Point, values: Tensor, moment: Moment | None) -> tuple[Activations, Tensor | None]:
        """Return a copy of the values that belong to a point, and the mask of its span if it has one."""
        if moment is not None and values.shape[:2] == (len(moment.own), moment.length):
            return _at_positions(point, values, moment)
        place, own = self._places[point], None
        if self._padding is not None and _of_media(place):
            own = self._padding.own(point, place, values=values)
        elif place.positional and moment is not None and not bool(moment.own.all()):
            raise LensError(
                f"{point!r}: activations of shape {tuple(values.shape)} have no token positions, so padding "
                f"can't be left out; record examples of one length at a time"
            )
        return Activations(values.clone(), own), None

    def __getitem__(self, point: Point) -> Activations | Statistics:
        if point not in self._passed:
            raise NoSuchSite(f"{point!r} was not recorded. Recorded: {near(point, self.points)}")
        return joined(self._passed[point]) if self._keep == "values" else self._statistics[point]

    def keys(self) -> Points:
        """Return the points; with them `dict(recording)` works."""
        return self.points

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getstate__(self) -> dict[str, object]:
        # Only the recorded values are pickled; the copy has no model, so it can't be entered again.
        gone: dict[str, object] = {
            "_model": None,
            "_known": _gone,
            "_tokenizer": None,
            "_places": {},
            "_swaps": Swaps(),
            "_padding": None,
        }
        return {**vars(self), **gone}

    def __repr__(self) -> str:
        return f"Recording({self.points!r}, {self._keep})"

    def _repr_html_(self) -> str:
        rows = [(f"{point.site!r}@{point.kind}", point.span, *self._shape(point)) for point in self]
        header = ("point", "span", "shape", "positions", "dtype")
        return html.table(header, rows, caption=f"Recording of {len(self)} points: {self._keep}")

    def _shape(self, point: Point) -> tuple[str, int, str]:
        """Return the shape of what was kept, the positions that are no padding, and the dtype."""
        if self._keep != "values":
            sums = self._statistics[point]
            shape = () if sums.total is None else tuple(sums.total.shape)
            return f"sums over {shape}", sums.count, "float64"
        if not self._passed[point]:
            return "nothing passed", 0, ""
        found = joined(self._passed[point])
        return str(tuple(found.values.shape)), len(found.rows), str(found.values.dtype).removeprefix("torch.")


def record(
    recording: Recording,
    lens: Live,
    *,
    examples: Sequence[Example | Mapping[str, Tensor]],
    prompt: str = "{text}",
    metric: Metric | None = None,
    batch_size: int = 32,
) -> Recording:
    """Fill a recording: run examples in batches, and prepared batches as they are."""
    for one in examples:
        if not isinstance(one, Example | Mapping):
            raise LensError(
                f"a {type(one).__name__} is neither an example nor a prepared batch: record takes "
                f"al.Example(…), or a batch from lens.prepare(…)"
            )
    # The model computes only the last logits unless asked for all (0).
    last = 0 if any(point.site.role == "lm_head" for point in recording.points) else 1
    for batch in _batches(lens, examples, prompt=prompt, size=batch_size):
        # A tensor made in inference mode, e.g. by the caller, can't take part in autograd.
        batch = {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in batch.items()}
        with (
            Running(lens),
            recording,
            torch.inference_mode(False),
            torch.set_grad_enabled(metric is not None),
        ):
            logits = forward(lens.model, batch, last=last)
            if metric is not None:
                mask = None if last else text_mask(batch, decodes=encodes(lens.model))
                recording.differentiate(metric(row_ends(logits, mask, count=1)[:, 0]))
    return recording


def _batches(
    lens: Live, examples: Sequence[Example | Mapping[str, Tensor]], *, prompt: str, size: int
) -> Iterator[Mapping[str, Tensor]]:
    for shown, group in groupby(examples, key=lambda one: isinstance(one, Example)):
        some = list(group)
        if not shown:
            yield from (one for one in some if isinstance(one, Mapping))
            continue
        named = [one for one in some if isinstance(one, Example)]
        make = partial(lens.prepare, prompt=prompt)
        for _, batch in batches(lens, named, make=make, tensors=dict, size=size, in_order=True):
            yield batch


def _of_media(place: Place) -> bool:
    """Return whether a place is in a tower, or reads one in cross-attention."""
    return not place.positional or place.stack == "encoder"


def _at_positions(point: Point, values: Tensor, moment: Moment) -> tuple[Activations, Tensor | None]:
    """Return a copy of the values of a point's span, and the mask of the span if it has one."""
    if moment.blind == OTHER_MASK:  # without a span too: padding would be counted
        raise LensError(f"{point!r}: {moment.blind}")
    chosen = moment.chosen(point.span).to(values.device)
    if moment.drafts and bool(chosen[:, max(0, moment.own.shape[1] - moment.start) :].any()):
        raise LensError(
            f"{point!r}: drafts of assisted decoding pass there, and some of them are rejected later. Record "
            f"without an assistant model or prompt_lookup_num_tokens, or choose a span of the prompt"
        )
    old = max(0, moment.seen - moment.start)  # without a cache, each step computes all positions again
    values, chosen = values[:, old:], chosen[:, old:]
    if point.span is None:
        return Activations(values.clone(), chosen), None
    return of_span(values, chosen), chosen


def _gone() -> None:
    """Stand in for the weak reference to the model in an unpickled copy."""
