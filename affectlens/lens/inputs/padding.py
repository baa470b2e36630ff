"""Padding: an id that the model has, and whether the model lets padding change its answers.

Most models mask padding out. Recurrent ones may read it as text (RWKV, RecurrentGemma, xLSTM), and some
decoders count the positions of a row from its padding. No config tells, so it is measured once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affectlens.checkpoints.memory import HELD
from affectlens.lens.failures import out_of_memory
from affectlens.lens.holding import Running
from affectlens.lens.live import UNSEEN, Live, answering, config_of, inner
from affectlens.lens.running import forward

# Limits for the rms change of the logits, in their standard deviations. Measured on 53 tiny families and on
# Llamas of 32 and 48 layers: padding that is masked out changes them by 0 against other padding of the same
# shape, and against the example alone, since rounding depends on shapes, by up to 3e-6 in float32 and 0.05 in
# bfloat16. Padding that is read changes them by 0.06 to 1.5.
_SHAPE, _CONTENT, _LEAST = 12, 2, 1e-4  # eps, eps, at least


def padding_id(model: nn.Module, tokenizer: Any) -> int | None:
    """Return a padding id inside the embedding: the tokenizer's if it is, else the config's, the end's, or 0.

    Without an embedding that can be found, it is the tokenizer's.
    """
    own, size = getattr(tokenizer, "pad_token_id", None), _embedded(model)
    if size is None:
        return own if type(own) is int else None
    others = (getattr(config_of(model), "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(token for token in (own, *others) if type(token) is int and 0 <= token < size)


def with_valid_padding(batch: Mapping[str, Tensor], model: nn.Module, *, tokenizer: Any) -> dict[str, Tensor]:
    """Return the batch with padding that the embedding has: masked tokens are looked up too."""
    own, valid = getattr(tokenizer, "pad_token_id", None), padding_id(model, tokenizer)
    if own is None or valid is None or valid == own or "input_ids" not in batch:
        return dict(batch)
    ids = batch["input_ids"]
    return {**batch, "input_ids": torch.where(ids == own, valid, ids)}


def is_padded(batch: Mapping[str, Tensor]) -> bool:
    """Return whether some rows of a batch may be padded; without a mask, several rows may be."""
    if "input_ids" not in batch or len(batch["input_ids"]) < 2:
        return False
    mask = batch.get("attention_mask")
    return mask is None or not bool(mask.bool().all())


@torch.no_grad()
def reads_padding(live: Live, *, alone: Mapping[str, Tensor], padded: Mapping[str, Tensor]) -> bool:
    """Measure whether a model's logits depend on padding, and keep the answer for this live model.

    `alone` is one example, `padded` the same in its first row beside a longer one. Interventions on
    activations and recordings don't see these passes. Where memory does not suffice for two rows, it is true.
    """
    quiet = UNSEEN.set(True)
    try:
        with Running(live):
            found = _differs(live.model, alone, padded)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return True
    finally:
        UNSEEN.reset(quiet)
    if not HELD:  # with changed weights, e.g. zeroed ones, another model would be measured
        live.reads_padding = found
    return found


def _differs(model: nn.Module, alone: Mapping[str, Tensor], padded: Mapping[str, Tensor]) -> bool:
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    eps = torch.finfo(dtype).eps
    expected, found = (forward(model, batch)[0, -1] for batch in (alone, padded))
    if _far(found, expected, max(_LEAST, _SHAPE * eps)):
        return True
    other = _other_padding(padded)
    return other is not None and _far(forward(model, other)[0, -1], found, max(_LEAST, _CONTENT * eps))


def _far(logits: Float[Tensor, " token"], others: Float[Tensor, " token"], limit: float) -> bool:
    # Written so that NaN, which an unmasked row of padding may bring, counts as far.
    return not bool((logits - others).square().mean().sqrt() <= limit * others.std())


def _other_padding(padded: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the batch with another token as padding, from the text of its longest row; None without any."""
    ids, hidden = padded["input_ids"], padded["attention_mask"] == 0
    if hidden.shape != ids.shape or not hidden.any():
        return None
    texts = ids[-1][~hidden[-1]].flip(0)  # from the end, where no placeholders of media are
    others = texts[texts != ids[hidden][0]]
    return {**padded, "input_ids": torch.where(hidden, others[0], ids)} if others.numel() else None


def _embedded(model: nn.Module) -> int | None:
    """Return the number of rows of the input embedding; None where there is none."""
    try:
        embedding = inner(answering(model)).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(embedding, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None
