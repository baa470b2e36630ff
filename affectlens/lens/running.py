"""Run a model of any kind: causal, omni, encoder-decoder, with or without an adapter.

model ── answering ──▶ the part whose forward pass gives logits of text
batch ── started ──▶ with a decoder's first token ── called ──▶ logits
      └── continued ──▶ with an answer behind it
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.failures import told
from affectlens.lens.greedy import greedily
from affectlens.lens.inputs.row_ends import ends_in_padding, row_ends, text_mask
from affectlens.lens.inputs.tokens import special_tokens
from affectlens.lens.live import ANSWER, answering, config_of, encodes, inner
from affectlens.lens.precision import logits_in_float32
from affectlens.tasks.written_answers import THOUGHTS

_NOTES = ("token_type_ids", "mm_token_type_ids")  # of a tokenizer, of models that take them


def typed(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast the floating-point tensors of a batch to the model's dtype; token ids stay integers."""
    part = answering(model)
    dtype = next((p.dtype for p in part.parameters() if p.dtype.is_floating_point), torch.float32)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}


def started(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the token that a decoder begins with, where there is a decoder. Raises `LensError`."""
    found = dict(batch)
    takes = _takes(model)
    for name in _NOTES:
        if name not in takes:
            found.pop(name, None)
    if not encodes(model) or "decoder_input_ids" in found:
        return found
    token = begins(model)
    if token is None:
        raise LensError("no config of this model has a decoder_start_token_id or bos_token_id: set one")
    some = next(iter(found.values()))
    found["decoder_input_ids"] = torch.full((rows(found), 1), token, device=some.device)
    return found


def begins(model: nn.Module) -> int | None:
    """Return the token that a decoder begins with; None where no config of the model names one."""
    part = inner(answering(model))
    config = config_of(model)
    texts = [config.get_text_config(decoder=True)] if hasattr(config, "get_text_config") else []
    for settings in (getattr(part, "generation_config", None), config, *texts):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(settings, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if type(token) is int:
                return token
    return None


def decoder_ids(model: nn.Module, tokenizer: Any, *, label: str) -> tuple[int, ...]:
    """Return the tokens that a decoder is trained to write for a label, without start and end."""
    with told(f"the label {label!r} can't be tokenized"):
        ids = list(tokenizer.encode(label))
        after = special_tokens(tokenizer)[1]  # the end, which is not eos_token for all: BERT's is [SEP]
    ids = ids[: -len(after)] if after and tuple(ids[-len(after) :]) == after else ids
    return tuple(ids[1:] if ids and ids[0] == begins(model) else ids)


def rows(batch: Mapping[str, Tensor]) -> int:
    """Count the examples of a batch."""
    named = ("decoder_input_ids", "input_ids", "input_features", "input_values", "pixel_values")
    return len(next(batch[name] for name in named if name in batch))


def continued(batch: Mapping[str, Tensor], answer: Int[Tensor, "batch token"]) -> dict[str, Tensor]:
    """Append an answer to every example; of an encoder-decoder, to the decoder's input."""
    longer = dict(batch)
    decodes = "decoder_input_ids" in batch
    name = "decoder_input_ids" if decodes else "input_ids"
    longer[name] = torch.cat([batch[name], answer.to(batch[name])], dim=1)
    if not decodes:
        mask = batch.get("attention_mask", torch.ones_like(batch[name]))
        longer["attention_mask"] = torch.cat([mask, torch.ones_like(answer).to(mask)], dim=1)
    for note in () if decodes else _NOTES:
        if note in batch:
            longer[note] = torch.cat([batch[note], torch.zeros_like(answer).to(batch[note])], dim=1)
    if not decodes and "position_ids" in batch:
        later = torch.arange(1, answer.shape[1] + 1, device=batch["position_ids"].device)
        longer["position_ids"] = torch.cat(
            [batch["position_ids"], batch["position_ids"][..., -1:] + later], dim=-1
        )
    return longer


def forward(
    model: nn.Module, batch: Mapping[str, Tensor], *, last: int = 1, answer: int = 0
) -> Float[Tensor, "batch last vocabulary"]:
    """Return the logits at the last tokens of each row, in float32; of all positions, if `last` is 0.

    Padding may be on either side. Interventions treat the last `answer` tokens of each row as generated, not
    as part of the prompt. Raises `LensError` where the model can't run.
    """
    mask = text_mask(batch, decodes=encodes(model))
    # A model keeps the logits of the last columns, which are padding where rows end in it.
    kept = 0 if ends_in_padding(mask) else last
    logits: Tensor = called(model, batch, last=kept, answer=answer).logits
    return (row_ends(logits, mask, count=last) if last else logits).float()


def called(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    last: int = 1,
    answer: int = 0,
    cache: Any = None,
    use_cache: bool = False,
) -> Any:
    """Run a batch and return the model's output, with the logits of at least the last positions.

    With a `cache`, the ids of the batch stand behind what it holds; the mask covers both.
    """
    takes = _takes(model)
    given: dict[str, Any] = typed(model, batch if cache is not None else started(model, batch))
    # Saves the logits of all other positions, where the model supports it.
    settings: dict[str, Any] = {"logits_to_keep": last} if "logits_to_keep" in takes else {}
    if (
        "position_ids" in takes
        and {"position_ids", "attention_mask"} & given.keys() == {"attention_mask"}
        and _numbers(model)
    ):
        numbers = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        given["position_ids"] = numbers[:, -given["input_ids"].shape[1] :]
    if cache is not None:
        settings["past_key_values"] = cache
    asked = ANSWER.set(answer)
    try:
        with told("the model can't run these examples"), logits_in_float32(model):
            out = answering(model)(**given, use_cache=use_cache or cache is not None, **settings)
            assert isinstance(out.logits, Tensor)
    finally:
        ANSWER.reset(asked)
    return out


def mixes_rows(model: nn.Module) -> bool:
    """Return whether rows of a batch change each other's generated text, as RWKV's do in transformers.

    Its state of one token per row is broadcast against the rows from the second step on.
    """
    return "state" in _takes(model)


def generated(
    model: nn.Module, batch: Mapping[str, Tensor], *, tokenizer: Any, settings: Mapping[str, Any]
) -> list[str]:
    """Generate with these settings alone and return the new text of each example. Raises `LensError`."""
    given = typed(model, started(model, batch))
    more = {"tokenizer": tokenizer} if "stop_strings" in settings else {}
    with told("the model can't answer these examples"), greedily(model):
        out = _generate(answering(model))(**given, **settings, **more)
    before = given["decoder_input_ids" if encodes(model) else "input_ids"]
    return _decoded(tokenizer, out[:, before.shape[1] :])


def _decoded(tokenizer: Any, tokens: Int[Tensor, "batch token"]) -> list[str]:
    """Return texts without special tokens, apart from those that begin and end a thought."""
    tags = "".join(tag for both in THOUGHTS for tag in both)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*filter(None, tokenizer.all_special_tokens), *(str(one) for one in added if one.special)}
    kept = {token for token in special if token in tags}
    texts = list(tokenizer.batch_decode(tokens, skip_special_tokens=not kept))
    for token in sorted(special - kept if kept else (), key=len, reverse=True):
        texts = [text.replace(token, "") for text in texts]
    return texts


def _generate(part: nn.Module) -> Callable[..., Tensor]:
    """Return `generate`; for Whisper the common one, as its own transcribes windows and forces tokens."""
    own: Callable[..., Tensor] = part.generate  # type: ignore[assignment]
    if "whisper" not in getattr(own, "__module__", ""):
        return own
    from transformers import GenerationMixin

    return partial(GenerationMixin.generate, part)


def _takes(model: nn.Module) -> Sequence[str]:
    """Return the argument names of a model's forward pass; PEFT's wrapper passes all of them on."""
    return tuple(inspect.signature(inner(answering(model)).forward).parameters)


def _numbers(model: nn.Module) -> bool:
    """Return whether position ids must be given: learned absolute positions shift under left padding.

    Rotary positions and ALiBi depend on distances between tokens, which padding does not change.
    """
    config = config_of(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return not encodes(model) and getattr(text, "rope_parameters", None) is None
