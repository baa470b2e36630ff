"""Turn what a model is called with, and what `generate` said of it, into the moment of the pass.

arguments ──▶ Passing ── told(step) ────────▶ Moment, in `generate`
                      ── untold(earlier) ───▶ Moment, of a pass by itself
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from affectlens.lens.hooks.positions import EMBEDDED, OTHER_MASK, Moment
from affectlens.lens.hooks.telling import Generating, Step
from affectlens.lens.inputs.media_items import sizes_of
from affectlens.lens.inputs.named_spans import TokenReader
from affectlens.lens.live import ANSWER

# Arguments and outputs of models that hold what earlier passes computed (in transformers ALL_CACHE_NAMES).
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_SEVERAL_TOKENS = (
    "the pass continues a cache with several tokens, or from before its end, so it is unclear which of them "
    "belong to the prompt. Use `generate`, or run prompt and answer as one batch: lens.run(batch, answer=…)"
)
_STATE = (
    "the model continues a state that was computed before this block, which does not say how many tokens it "
    "has read, so spans are unknown. Compute it in the block too"
)
_PIECES = (
    "a prompt is taken in pieces behind a cache that was filled before, so its end is unclear. "
    "Generate without prefill_chunk_size"
)
_OTHER_TOKENS = "generate has changed the tokens of the prompt, so spans are unknown; set token_healing=False"
_EARLIER = (
    "the tokens in the cache are unknown (give `generate` all of them, and compute the cache in the block)"
)


@dataclass(frozen=True)
class Passing:
    """What goes into a pass: tokens or embeddings, their mask, and the cache that it continues."""

    call: Mapping[str, Any]  # all arguments, by name
    given: Tensor  # (batch, position) or (batch, position, feature)
    mask: Any
    cache: Any
    device: torch.device
    whole: bool

    @property
    def rows(self) -> int:
        """The number of rows of the batch."""
        return len(self.given)

    @property
    def length(self) -> int:
        """The number of positions that the pass computes."""
        return self.given.shape[1]

    def masked(self, mask: Any, count: int) -> tuple[Tensor, str]:
        """Return which of the first positions are not padding, and why that is unknown, if it is."""
        every = torch.ones(self.rows, count, dtype=torch.bool, device=self.device)
        if mask is None:
            return every, ""
        if isinstance(mask, Tensor) and mask.shape == every.shape:
            return mask.bool(), ""
        return every, OTHER_MASK


def passing(
    module: nn.Module, args: tuple[Any, ...], *, kwargs: Mapping[str, Any], whole: bool
) -> Passing | None:
    """Return what goes into a module's pass; None where it is no tokens."""
    names = inspect.signature(module.forward).parameters
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    prefix = "decoder_" if "decoder_input_ids" in names else ""
    ids = call.get(f"{prefix}input_ids")
    given = ids if isinstance(ids, Tensor) and ids.ndim == 2 else call.get(f"{prefix}inputs_embeds")
    if not isinstance(given, Tensor):
        return None
    cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
    return Passing(call, given, call.get(f"{prefix}attention_mask"), cache, given.device, whole)


def held(cache: Any, earlier: Moment | None) -> int | None:
    """Return how many positions a cache holds, given the last pass that filled it; None where unknown."""
    if cache is None:
        return 0
    try:
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        if hasattr(cache, "seqlen_offset"):
            return int(cache.seqlen_offset)
    except ValueError:  # only states of recurrent layers, which are not counted
        if not cache.has_previous_state():
            return 0
    return None if earlier is None else earlier.end


def told(step: Step, passed: Passing, *, holds: int | None, reader: TokenReader) -> Moment:
    """Return the moment of a pass that `generate` has announced."""
    call, first = step.call, step.call.prompt is None and not step.call.blind
    if first:
        _begin(call, step, passed, holds=holds)
    if call.blind or call.prompt is None:
        own, _ = passed.masked(passed.mask, (holds or 0) + passed.length)
        return Moment(
            holds or 0, passed.length, own, None, reader, passed.call,
            begins=first, whole=passed.whole, blind=call.blind,
        )  # fmt: skip
    before = call.prompt - call.ids.shape[1]  # positions in front of the tokens that generate has
    start = holds or 0 if step.begins else before + step.ids.shape[1] - passed.length
    decodes = "decoder_input_ids" in passed.call
    own, blind = passed.masked(
        call.settings.get("decoder_attention_mask" if decodes else "attention_mask"), call.prompt
    )
    end = start + passed.length
    moment = Moment(
        start, passed.length, own, None if before else call.ids, reader, passed.call,
        begins=first, whole=passed.whole, blind=blind,
        untold=EMBEDDED if call.settings.get("inputs_embeds") is not None else _EARLIER,
        sizes=call.sizes, beams=call.beams,
        seen=start if passed.cache is not None else call.seen,
        drafts=passed.cache is not None and passed.length > 1 and end > call.prompt,
    )  # fmt: skip
    call.seen = end
    return moment


def _begin(call: Generating, step: Step, passed: Passing, *, holds: int | None) -> None:
    """Find the end of the prompt from the first pass of a call."""
    tokens, now = call.ids.shape[1], step.ids.shape[1]
    both = min(tokens, now)
    if holds is None:
        call.blind = _STATE
    elif not torch.equal(call.ids[:, :both], step.ids[:, :both]):
        call.blind = _OTHER_TOKENS
    elif now < tokens and holds:
        call.blind = _PIECES
    else:
        # All tokens so far end where the pass ends; some of them may be in the cache, or be drafts.
        call.prompt = tokens if now < tokens else tokens + holds + passed.length - now


def untold(passed: Passing, *, earlier: Moment | None, holds: int | None, reader: TokenReader) -> Moment:
    """Return the moment of a pass by itself, given the last one that filled its cache in this block."""
    same = earlier is not None and len(earlier.own) == passed.rows
    if holds and earlier is not None and same:
        # A token at a time, as an answer is written; or the answers that `ANSWER` announces.
        behind = earlier.own.shape[1] <= holds <= earlier.end
        if behind and (passed.length == 1 or bool(ANSWER.get())):
            return replace(
                earlier, start=holds, length=passed.length, call=passed.call, begins=False,
                whole=passed.whole, seen=holds, drafts=False, _known={}, _some={},
            )  # fmt: skip
    start = holds or 0
    own, blind = passed.masked(passed.mask, start + passed.length)
    if holds and earlier is not None:
        blind = blind or _SEVERAL_TOKENS
    ids = passed.given if passed.given.ndim == 2 and not start else None
    return Moment(
        start, passed.length, own, ids, reader, passed.call, whole=passed.whole,
        sizes=sizes_of(passed.call), blind=_STATE if holds is None else blind,
        untold=_EARLIER if start else EMBEDDED,
    )  # fmt: skip
