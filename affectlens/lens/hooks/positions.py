"""Moments: which positions of its input a running forward pass is about, also step by step in `generate`.

    a forward pass ──▶ ids, mask, cache ──▶ Moment: start, length ── chosen(span) ──▶ positions

Hooks deep inside a model see tensors and no tokens. What was asked is written down where the model is
entered: the prompt at the first pass, and from then on how much of it lies in the cache.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.inputs.rendering import spans
from affectlens.lens.live import ANSWER, answering, config_of, encodes, inner
from affectlens.lens.restoring import Swaps
from affectlens.sites import Span

_AT_ONCE = (
    "several tokens at once go on from a cache, so which of them are the prompt can't be known; generate "
    "without prefill_chunk_size and assistants"
)
_OTHER_MASK = (
    "the mask that the model is given does not say which tokens are padding, so spans can't be known; "
    "generate with a dynamic cache, or give a mask of batch and positions"
)


@dataclass
class Moment:
    """The positions `start` to `start + length` of a batch; the first `prompt` of all were given."""

    start: int
    length: int
    own: Bool[Tensor, "batch prompt"]  # false for padding
    ids: Int[Tensor, "batch prompt"] | None  # unknown where embeddings were given
    config: Any  # which says the placeholders of media
    call: Mapping[str, Any]  # what the model was called with
    begins: bool = True  # a new input, not a further step of the last
    blind: str = ""  # why padding or the prompt can't be told, if so
    first_key: int = 0  # in an attention: the position of its first key
    across: "Moment | None" = None  # in an attention: what its keys are of, where that is another stack
    _known: dict[Span, Tensor] = field(default_factory=dict)
    _some: dict[Span, bool] = field(default_factory=dict)

    def tail(self, count: int) -> "Moment":
        """The same of the last positions alone: a model may leave out logits that nobody asked for."""
        return replace(self, start=self.start + self.length - count, length=count, _known={}, _some={})

    def goes_on(self, start: int, cache: Any) -> bool:
        """Whether a pass that starts there is a further step of this one's input, and not of another."""
        return start == self.start + self.length or self.call.get("past_key_values") is cache

    def asked(self, answer: int) -> "Moment":
        """The same where the last tokens of a new input are an answer, as if it had been generated."""
        if not answer or not self.begins:
            return self
        ids = None if self.ids is None else self.ids[:, :-answer]
        return replace(self, own=self.own[:, :-answer], ids=ids, _known={}, _some={})

    def chosen(self, span: Span) -> Bool[Tensor, "batch position"]:
        """The positions of this pass that belong to a span; all but padding for None.

        Raises `LensError` where that can't be known.
        """
        if span not in self._known:
            self._known[span] = self.so_far(span)[:, self.start :]
        return self._known[span]

    def some(self, span: Span) -> bool:
        """Whether any position of this pass belongs to a span; a device is asked once a pass."""
        if span not in self._some:
            self._some[span] = bool(self.chosen(span).any())
        return self._some[span]

    def so_far(self, span: Span) -> Bool[Tensor, "batch position"]:
        """The same of all positions up to the end of this pass."""
        if self.blind and span is not None:
            raise LensError(self.blind)
        rows, prompt = self.own.shape
        later = torch.zeros(
            rows, max(0, self.start + self.length - prompt), dtype=torch.bool, device=self.own.device
        )
        if span is None or span == "generated":
            return torch.cat([self.own & (span is None), ~later], dim=1)
        if not isinstance(span, str):
            return self._numbered((span,) if isinstance(span, int) else span, later)
        # Of each row its own last token: the batch may be padded on either side.
        return (
            self._numbered((-1,), later) if span == "last" else torch.cat([self._named(span), later], dim=1)
        )

    def _named(self, span: str) -> Bool[Tensor, "batch prompt"]:
        if span == "prompt":
            return self.own
        if self.ids is None:
            raise LensError(f"the model was given embeddings, so where its {span} is can't be known")
        parts = spans(self.ids, self.own.long(), config=self.config)
        if span not in parts:
            raise LensError(
                f"this model's input has no {span}; by its config it is made of {', '.join(parts)}"
            )
        return parts[span]

    def _numbered(self, numbers: tuple[int, ...], later: Tensor) -> Bool[Tensor, "batch position"]:
        """Tokens by their number among an example's own: padding is not counted."""
        every = torch.cat([self.own, ~later], dim=1)
        count = self.own.sum(1, keepdim=True)
        number = every.cumsum(1) - 1
        found = torch.zeros_like(every)
        for asked in numbers:
            if asked < 0 and bool((count + asked < 0).any()):
                raise LensError(f"token {asked} of an example that has {int(count.min())} tokens")
            found |= every & (number == (asked if asked >= 0 else count + asked))
        return found


class Moments:
    """Follow a model: at each of its forward passes, say which positions it is about."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._config = model, config_of(model)
        self._now: dict[str, Moment | None] = {}
        self.passes = 0

    def follow(self, swaps: Swaps) -> None:
        """Watch the model until the swaps are undone."""
        for module, entered in self.entrances():
            swaps.hook(module, entered, side="enter")

    def entrances(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Where tokens go in, and what has to be called there before all else."""
        # PEFT's wrapper is passed by in `generate`; what it wraps is not.
        answers = inner(answering(self._model))
        yield answers, self._entered
        if encodes(self._model):
            yield answers.get_encoder(), self._encoding  # type: ignore[operator]

    def forget(self) -> None:
        """Let go of what the model was called with."""
        self._now.clear()

    @property
    def encoder(self) -> Moment | None:
        """The moment of the encoder, where it reads tokens."""
        return self._now.get("encoder")

    def now(self, stack: str | None, shape: Sequence[int]) -> Moment | None:
        """The moment of the running pass that what has this shape belongs to; None where it has no tokens.

        An encoder and a decoder have each their own; attention across takes what has the encoder's shape.
        """
        first = self._now.get(stack or "")
        there = [one for one in (first, *self._now.values()) if one is not None]
        fits = (one for one in there if tuple(shape[:2]) == (len(one.own), one.length))
        return next(fits, there[0] if there else None)

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.passes += 1
        stack, prefix = ("decoder", "decoder_") if encodes(self._model) else ("", "")
        names = inspect.signature(module.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        found = _moment(self._now.get(stack), kwargs, prefix=prefix, config=self._config)
        self._now[stack] = found if found is None else found.asked(ANSWER.get())

    def _encoding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._now["encoder"] = _moment(
            None, {**kwargs, **({"input_ids": args[0]} if args else {})}, prefix="", config=self._config
        )


def _moment(
    before: Moment | None,
    kwargs: Mapping[str, Any],
    *,
    prefix: str,
    config: Any,
) -> Moment | None:
    """What a call is about, given what the last one was; None where no tokens go in."""
    ids = kwargs.get(f"{prefix}input_ids")
    given = ids if isinstance(ids, Tensor) and ids.ndim == 2 else kwargs.get(f"{prefix}inputs_embeds")
    if not isinstance(given, Tensor):
        return None
    rows, length = given.shape[:2]
    past = kwargs.get("past_key_values")
    start = int(past.get_seq_length()) if past is not None and hasattr(past, "get_seq_length") else 0
    # A step goes on where the one before ended, or takes back a part of it, in the very same cache.
    if start and before is not None and len(before.own) == rows and before.goes_on(start, past):
        blind = before.blind or (_AT_ONCE if length > 1 else "")
        return Moment(start, length, before.own, before.ids, config, kwargs, begins=False, blind=blind)
    mask = kwargs.get(f"{prefix}attention_mask")
    own = torch.ones(rows, start + length, dtype=torch.bool, device=given.device)
    if isinstance(mask, Tensor) and mask.shape == own.shape:
        own = mask.bool()
    known = mask is None or (isinstance(mask, Tensor) and mask.shape == own.shape)
    blind = "" if known else _OTHER_MASK
    return Moment(
        start, length, own, ids if given is ids and not start else None, config, kwargs, blind=blind
    )
