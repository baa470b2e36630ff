"""Find the positions of a span among those that a forward pass computes.

    Moment: prompt, answer, start, length ── chosen(span) ──▶ (batch, position)

`passes` makes a moment at each forward pass of a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from affectlens.errors import LensError
from affectlens.lens.inputs.media_items import NO_SIZES, Sizes
from affectlens.lens.inputs.named_spans import TokenReader
from affectlens.sites import Span
from affectlens.sites.span_names import span_name

EMBEDDED = "the model was given embeddings instead of tokens"
OTHER_MASK = (
    "the attention mask of this model call does not show which tokens are padding, so spans are unknown. "
    "Pass a mask of shape (batch, position) for all positions, those in the cache too"
)


@dataclass
class Moment:
    """The positions that one forward pass computes: `start` to `start + length` of each row.

    The prompt is a part of the first `own.shape[1]` positions; all later ones are generated.
    """

    start: int
    length: int
    own: Bool[Tensor, "batch first"]  # the tokens of the prompt; false for padding
    ids: Int[Tensor, "batch first"] | None  # None where they are unknown
    reader: TokenReader  # knows placeholders of media, and words
    call: Mapping[str, Any]  # the keyword arguments of the model's call
    begins: bool = True  # a new input, not a further step of the last one
    whole: bool = True  # the whole model runs, not a part that was called by itself
    blind: str = ""  # why padding or the end of the prompt is unknown, if so
    untold: str = EMBEDDED  # why `ids` are unknown
    seen: int = 0  # earlier passes computed the positions before this one
    skipped: int = 0  # positions of the pass in front of `start`, which the model dropped: see `tail`
    drafts: bool = False  # some of the generated tokens may be rejected: assisted decoding
    sizes: Sizes = NO_SIZES  # of the media
    beams: int = 1  # so many rows in a row are one example
    answer: Bool[Tensor, "batch first"] | None = None  # tokens of an answer that was given with the prompt
    first_key: int = 0  # in an attention: the position of its first key
    across: "Moment | None" = None  # in cross-attention: the moment of the keys
    _known: dict[Span, Tensor] = field(default_factory=dict)
    _some: dict[Span, bool] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The number of positions up to the end of this pass."""
        return self.start + self.length

    def tail(self, count: int) -> "Moment":
        """Return the moment of the last `count` positions: a model may skip logits of earlier ones."""
        dropped = self.length - count
        start, skipped = self.start + dropped, self.skipped + dropped
        return replace(self, start=start, length=count, skipped=skipped, _known={}, _some={})

    def kept(self) -> "Moment":
        """Return the moment without the arguments of the call, which hold the media and the cache."""
        return replace(self, call={}, _known={}, _some={})

    def repeated(self, times: int) -> "Moment":
        """Return the moment with each row `times` times in a row, as a search with beams has them."""
        own, ids = (
            rows if rows is None else rows.repeat_interleave(times, dim=0) for rows in (self.own, self.ids)
        )
        assert own is not None
        return replace(self, own=own, ids=ids, beams=times, _known={}, _some={})

    def asked(self, answer: int) -> "Moment":
        """Return the moment with the last `answer` tokens of each row counted as generated."""
        if not answer or not self.begins:  # a further step holds no token of the prompt
            return self
        behind = self.own & (self.own.flip(1).cumsum(1).flip(1) <= answer)
        return replace(self, own=self.own & ~behind, answer=behind, _known={}, _some={})

    def of_prompt(self, chosen: Bool[Tensor, "batch position"]) -> Bool[Tensor, "batch first"]:
        """Return a mask from `so_far` without generated tokens."""
        found = chosen[:, : self.own.shape[1]]
        return found & self.own[:, : found.shape[1]].to(found.device)

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
        rows, first = self.own.shape
        given = torch.zeros_like(self.own) if self.answer is None else self.answer
        later = torch.ones(rows, max(0, self.end - first), dtype=torch.bool, device=self.own.device)
        if span is None or span == "generated":
            found = torch.cat([given | self.own if span is None else given, later], dim=1)
        elif span == "last":
            found = self._numbered((-1,), given, later)
        elif isinstance(span, str):
            found = torch.cat([self._named(span), ~later], dim=1)
        else:
            found = self._numbered((span,) if isinstance(span, int) else span, given, later)
        return found[:, : self.end]

    def _named(self, span: str) -> Tensor:
        if span == "prompt":
            return self.own
        if self.ids is None:
            raise LensError(f"{self.untold}, so its {span} is unknown")
        ids, own = self.ids[:: self.beams], self.own[:: self.beams]
        found = self.reader.chosen(span_name(span), ids, own=own, sizes=self.sizes)
        return found.repeat_interleave(self.beams, dim=0)

    def _numbered(
        self, numbers: tuple[int, ...], given: Tensor, later: Tensor
    ) -> Bool[Tensor, "batch position"]:
        """Return the tokens with these numbers, counted in each row without padding."""
        # Counted per row, since the batch may be padded on either side.
        every = torch.cat([self.own | given, later], dim=1)
        count = self.own.sum(1, keepdim=True)
        number = every.cumsum(1) - 1
        found = torch.zeros_like(every)
        for asked in numbers:
            if asked < 0 and bool((count + asked < 0).any()):
                raise LensError(f"token {asked} was selected, but an example has {int(count.min())} tokens")
            found |= every & (number == (asked if asked >= 0 else count + asked))
        return found
