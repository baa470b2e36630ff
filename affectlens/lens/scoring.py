"""Score labels as answers: log p(label | prompt), the sum over the label's tokens.

    prompt ── one pass ──▶ the first token of every label, and a cache
           ── from the cache, one short pass a label ──▶ its further tokens

Where a cache can't be taken back by a few tokens (of recurrent models and encoder-decoders, or with a full
sliding window), prompt and label are run together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from affectlens.lens.inputs.choices import Choices
from affectlens.lens.live import answering, encodes, inner
from affectlens.lens.running import called, continued

_NONE = -1  # stands behind the last token of a label


@torch.no_grad()
def label_logps(model: nn.Module, asked: Choices) -> Float[Tensor, "batch label"]:
    """Return the log-probability of each label behind each prompt, in float32, on the CPU.

    Raises `LensError` where the model can't run the batch.
    """
    ids = _padded(asked)
    longest = ids.shape[-1]
    # A recurrent model's state can't be taken back; transformers marks it.
    goes_back = (
        longest > 1 and not encodes(model) and not getattr(inner(answering(model)), "_is_stateful", False)
    )
    with _noting_positions(model, on=goes_back) as noted:
        out = called(model, asked.batch, use_cache=goes_back)
    logps = out.logits[:, -1].float().log_softmax(-1)
    found = _at(logps[:, None], ids[:, :, :1]).squeeze(-1)
    cache = getattr(out, "past_key_values", None) if goes_back else None
    rewinds = _rewinds(cache, longest)
    for number in (ids[:, :, 1:] != _NONE).any(2).any(0).nonzero().flatten().tolist():
        label = ids[:, number]
        label = label[:, : int((label != _NONE).sum(1).max())]
        if rewinds:
            found[:, number] += _further(model, asked, label=label, cache=cache, noted=noted)
        else:
            found[:, number] = _whole(model, asked, label=label)
    return found.cpu()


@contextmanager
def _noting_positions(model: nn.Module, *, on: bool) -> Iterator[list[Tensor]]:
    """Note the position ids of a model in which the tokens of a picture share positions (mrope).

    Such a model keeps the offset of its last input, which may be that of another batch.
    """
    part = inner(answering(model))
    noted: list[Tensor] = []
    if not on or not any(hasattr(module, "rope_deltas") for module in part.modules()):
        yield noted
        return

    def _note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    handle = part.get_decoder().rotary_emb.register_forward_pre_hook(_note, with_kwargs=True)  # type: ignore
    try:
        yield noted
    finally:
        handle.remove()


def _padded(asked: Choices) -> Int[Tensor, "batch label token"]:
    """Return the token ids of all labels as one tensor, with `_NONE` behind the shorter ones."""
    longest = max(len(ids) for row in asked.labels for ids in row)
    ids = [[[*ids, *[_NONE] * (longest - len(ids))] for ids in row] for row in asked.labels]
    return torch.tensor(ids, device=next(iter(asked.batch.values())).device)


def _further(
    model: nn.Module,
    asked: Choices,
    *,
    label: Int[Tensor, "batch token"],
    cache: Any,
    noted: Sequence[Tensor],
) -> Float[Tensor, " batch"]:
    """Return the log-probability of a label's tokens after the first, and take the cache back."""
    given = label[:, :-1]
    longer = continued(asked.batch, given.clamp(min=0))  # what stands behind a shorter label is not read
    ids = longer["input_ids"][:, -given.shape[1] :]
    step = {"input_ids": ids, "attention_mask": longer["attention_mask"]}
    if "position_ids" in longer:
        step["position_ids"] = longer["position_ids"][..., -given.shape[1] :]
    elif noted:
        last = noted[0][..., -1:]
        step["position_ids"] = last + torch.arange(1, given.shape[1] + 1, device=last.device)
    out = called(model, step, last=given.shape[1], answer=given.shape[1], cache=cache)
    cache.crop(-given.shape[1])
    return _at(out.logits.float().log_softmax(-1), label[:, None, 1:]).sum(-1).squeeze(1)


def _whole(model: nn.Module, asked: Choices, *, label: Int[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
    """Return the log-probability of a label from one pass over prompt and label."""
    length = label.shape[1]
    longer = continued(asked.batch, label.clamp(min=0))
    out = called(model, longer, last=length + 1, answer=length)
    # The k positions before the last predict the k tokens of the label.
    logps = out.logits[:, -length - 1 : -1].float().log_softmax(-1)
    return _at(logps, label[:, None]).sum(-1).squeeze(1)


def _at(
    logps: Float[Tensor, "batch token vocabulary"], ids: Int[Tensor, "batch label token"]
) -> Float[Tensor, "batch label token"]:
    """Return the log-probability of each token, and 0 where a label has ended."""
    every = logps[:, None].expand(-1, ids.shape[1], -1, -1)
    ids = ids.to(logps.device)
    found = every.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(ids == _NONE, 0.0)


def _rewinds(cache: Any, count: int) -> bool:
    """Return whether a cache can be taken back by up to `count` tokens, to the bit."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    # Models that keep a state beside keys and values have a class of their own.
    if type(cache) is not DynamicCache or not cache.layers:
        return False
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.get_seq_length() + count >= layer.sliding_window:
                return False
        elif type(layer) is not DynamicLayer:
            return False
    return True
