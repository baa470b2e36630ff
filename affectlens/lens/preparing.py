"""From examples to model input: chat template, pictures and text through the model's own processor."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from affectlens.errors import LensError, quoted
from affectlens.lens.rendering import rendered
from affectlens.lens.telling import told
from affectlens.tasks import Example
from affectlens.tasks.pictures import open_picture


def prepare(processor: Any, examples: Sequence[Example], *, prompt: str) -> dict[str, Tensor]:
    """Render and tokenize examples as one batch, padded on the left so that the last position answers."""
    texts = [_render(processor, example, prompt) for example in examples]
    pictures = [[open_picture(image) for image in example.images] for example in examples]
    _check_media(processor, examples, texts)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise LensError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    # Where a chat template wrote the beginning-of-sequence token, a second one would shift the model.
    begun = bool(tokenizer.bos_token) and all(text.startswith(tokenizer.bos_token) for text in texts)
    settings: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    settings["add_special_tokens"] = not begun
    with told("the processor can't read these examples"):
        if any(pictures):
            batch = processor(text=texts, images=pictures, **settings)
        else:
            batch = tokenizer(texts, **settings)
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def refuse_longer(batch: Mapping[str, Tensor], examples: Sequence[Example], *, config: Any) -> None:
    """Raise `LensError` for an example with more tokens than positions that the config gives its model.

    Where positions are stretched, or those of a picture shared, a config's number is not the limit.
    """
    text = config.get_text_config() if config is not None else None
    most = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]  # one a kind of layer
    if any(one.get("rope_type", "default") != "default" or "mrope_section" in one for one in ropes):
        return
    if type(most) is not int or most <= 0 or "attention_mask" not in batch:
        return
    lengths = batch["attention_mask"].sum(-1).tolist()
    for example, length in zip(examples, lengths, strict=True):
        if length > most:
            raise LensError(
                f"example {quoted(example.id)} has {length:,} tokens, and config.json gives the model "
                f"{most:,} positions (max_position_embeddings)"
            )


def _template(processor: Any) -> bool:
    return bool(getattr(processor, "chat_template", None))


def _render(processor: Any, example: Example, prompt: str) -> str:
    messages = example.chat(prompt)
    if _template(processor):
        if not hasattr(processor, "tokenizer"):  # a tokenizer's template takes strings for content
            messages = [{**m, "content": _words(m["content"])} for m in messages]
        with told(f"example {quoted(example.id)}: its chat can't be rendered"):
            return rendered(processor, messages)
    token = getattr(processor, "image_token", "")
    body = "\n".join(_words(message["content"]) for message in messages)
    return "\n".join([token] * len(example.images) + [body])


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content if part.get("type") == "text")


def _check_media(processor: Any, examples: Sequence[Example], texts: Sequence[str]) -> None:
    token = getattr(processor, "image_token", None)
    for example, text in zip(examples, texts, strict=True):
        if not token:
            if example.images:
                kind = type(processor).__name__
                raise LensError(f"example {example.id!r} has a picture, but {kind} takes text alone")
            continue
        places = text.count(token)
        if places != len(example.images):
            raise LensError(
                f"example {example.id!r}: the prompt has {places} places for pictures ({token}), "
                f"and there are {len(example.images)} pictures"
            )
