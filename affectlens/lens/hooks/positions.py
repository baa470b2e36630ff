"""Track which positions of the input a forward pass computes, also step by step in `generate`.

    a forward pass ──▶ ids, mask, cache ──▶ Moment: start, length ── chosen(span) ──▶ positions

A hook deep inside a model sees tensors, but no tokens. So a hook at the model's entrance notes the prompt at
the first pass, and from then on how many positions are in the cache.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.inputs.placeholders import spans
from affectlens.lens.live import ANSWER, UNSEEN, answering, config_of, encodes, inner
from affectlens.lens.restoring import Swaps, refuse_copy
from affectlens.sites import Span

_SEVERAL_TOKENS = (
    "one step adds several tokens to the cache, so it is unclear which of them belong to the prompt. "
    "Generate without prefill_chunk_size and without an assistant model"
)
_OTHER_MASK = (
    "the attention mask of this model call does not show which tokens are padding, so spans are unknown. "
    "Generate with a dynamic cache, or pass a mask of shape (batch, position)"
)


@dataclass
class Moment:
    """The positions that one forward pass computes: `start` to `start + length` of each row.

    The prompt is the first `own.shape[1]` positions; generated tokens follow.
    """

    start: int
    length: int
    own: Bool[Tensor, "batch prompt"]  # false for padding
    ids: Int[Tensor, "batch prompt"] | None  # None where the model was given embeddings
    config: Any  # names the placeholder tokens of media
    call: Mapping[str, Any]  # the keyword arguments of the model's call
    begins: bool = True  # a new input, not a further step of the last one
    blind: str = ""  # why padding or the end of the prompt is unknown, if so
    first_key: int = 0  # in an attention: the position of its first key
    across: "Moment | None" = None  # in cross-attention: the moment of the keys
    _known: dict[Span, Tensor] = field(default_factory=dict)
    _some: dict[Span, bool] = field(default_factory=dict)

    def tail(self, count: int) -> "Moment":
        """Return the moment of the last `count` positions: a model may skip logits of earlier ones."""
        return replace(self, start=self.start + self.length - count, length=count, _known={}, _some={})

    def goes_on(self, start: int, cache: object) -> bool:
        """Return whether a pass that starts there is a further step of the same input."""
        return start == self.start + self.length or self.call.get("past_key_values") is cache

    def asked(self, answer: int) -> "Moment":
        """Return the moment with the last `answer` tokens counted as generated, not as prompt."""
        if not answer:
            return self
        if not self.begins:  # behind the prompt in the cache; several tokens, but all are known
            return replace(self, blind="" if self.blind == _SEVERAL_TOKENS else self.blind)
        ids = None if self.ids is None else self.ids[:, :-answer]
        return replace(self, own=self.own[:, :-answer], ids=ids, _known={}, _some={})

    def chosen(self, span: Span) -> Bool[Tensor, "batch position"]:
        """Return which positions of this pass belong to a span; None means all but padding.

        Raises `LensError` where that is unknown.
        """
        if span not in self._known:
            self._known[span] = self.so_far(span)[:, self.start :]
        return self._known[span]

    def some(self, span: Span) -> bool:
        """Return whether any position of this pass belongs to a span."""
        # Cached: each `bool` of a tensor waits for the device, and every hook would wait again.
        if span not in self._some:
            self._some[span] = bool(self.chosen(span).any())
        return self._some[span]

    def so_far(self, span: Span) -> Bool[Tensor, "batch position"]:
        """Return which positions up to the end of this pass belong to a span, as in `chosen`."""
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
        # Counted per row, since the batch may be padded on either side.
        return (
            self._numbered((-1,), later) if span == "last" else torch.cat([self._named(span), later], dim=1)
        )

    def _named(self, span: str) -> Bool[Tensor, "batch prompt"]:
        if span == "prompt":
            return self.own
        if self.ids is None:
            raise LensError(f"the model was given embeddings instead of tokens, so its {span} is unknown")
        parts = spans(self.ids, self.own.long(), config=self.config)
        if span not in parts:
            raise LensError(
                f"the input of this model has no {span}. Spans that its config names: {', '.join(parts)}"
            )
        return parts[span]

    def _numbered(self, numbers: tuple[int, ...], later: Tensor) -> Bool[Tensor, "batch position"]:
        """Return the tokens with these numbers, counted in each row without padding."""
        every = torch.cat([self.own, ~later], dim=1)
        count = self.own.sum(1, keepdim=True)
        number = every.cumsum(1) - 1
        found = torch.zeros_like(every)
        for asked in numbers:
            if asked < 0 and bool((count + asked < 0).any()):
                raise LensError(f"token {asked} was selected, but an example has {int(count.min())} tokens")
            found |= every & (number == (asked if asked >= 0 else count + asked))
        return found


class Moments:
    """Follow the forward passes of a model, and keep the moment of the one that is running."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._config = model, config_of(model)
        self._now: dict[str, Moment | None] = {}
        self.passes = 0

    __reduce_ex__ = refuse_copy

    def follow(self, swaps: Swaps) -> None:
        """Install the hooks that follow the model, until the swaps are undone."""
        for module, entered in self.entrances():
            swaps.hook(module, entered, side="enter")

    def entrances(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Yield each module that takes tokens, and the hook to call first when it is entered."""
        # `generate` calls the model inside PEFT's wrapper, not the wrapper.
        answers = inner(answering(self._model))
        yield answers, self._entered
        if encodes(self._model):
            yield answers.get_encoder(), self._encoding  # type: ignore[operator]

    def forget(self) -> None:
        """Drop the last moments, and with them the tensors that the model was called with."""
        self._now.clear()

    @property
    def encoder(self) -> Moment | None:
        """The moment of the encoder; None in a model without one, or with one that reads no tokens."""
        return self._now.get("encoder")

    def now(self, stack: str | None, shape: Sequence[int]) -> Moment | None:
        """Return the moment of the running pass for a tensor of this shape; None where no tokens went in.

        An encoder and a decoder have a moment each. Inside the decoder, cross-attention handles tensors of
        the encoder's shape, so the shape decides which of the two it is.
        """
        first = self._now.get(stack or "")
        there = [one for one in (first, *self._now.values()) if one is not None]
        fits = (one for one in there if tuple(shape[:2]) == (len(one.own), one.length))
        return next(fits, there[0] if there else None)

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if UNSEEN.get():
            return
        self.passes += 1
        stack, prefix = ("decoder", "decoder_") if encodes(self._model) else ("", "")
        names = inspect.signature(module.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        found = _moment(self._now.get(stack), kwargs, prefix=prefix, config=self._config)
        self._now[stack] = found if found is None else found.asked(ANSWER.get())

    def _encoding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if UNSEEN.get():
            return
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
    """Return the moment of a call, given the one before it; None where no tokens go in."""
    ids = kwargs.get(f"{prefix}input_ids")
    given = ids if isinstance(ids, Tensor) and ids.ndim == 2 else kwargs.get(f"{prefix}inputs_embeds")
    if not isinstance(given, Tensor):
        return None
    rows, length = given.shape[:2]
    past = kwargs.get("past_key_values")
    start = int(past.get_seq_length()) if past is not None and hasattr(past, "get_seq_length") else 0
    # A step continues where the last one ended, or goes back a few tokens in the same cache.
    if start and before is not None and len(before.own) == rows and before.goes_on(start, past):
        blind = before.blind or (_SEVERAL_TOKENS if length > 1 else "")
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
