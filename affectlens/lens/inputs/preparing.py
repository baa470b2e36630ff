"""Turn examples into one batch of model input: text, pictures, sounds and films.

example ── prompt_format ──▶ text with a placeholder for each medium ─┐
    └── opened ──▶ pictures, sounds at its rate, frames ─────────┴─▶ processor ──▶ checked batch
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from affectlens.errors import LensError, quoted
from affectlens.lens.failures import told
from affectlens.lens.inputs.placeholders import MEDIA, spans
from affectlens.lens.inputs.prompt_format import ADDS_PLACEHOLDERS, PromptFormat
from affectlens.lens.inputs.tokens import shortened, special_tokens
from affectlens.tasks import Example
from affectlens.tasks.films import open_film
from affectlens.tasks.pictures import open_picture
from affectlens.tasks.sounds import open_sound

_WORDS = {
    "image": ("a picture", "pictures"),
    "audio": ("a sound", "sounds"),
    "video": ("a film", "films"),
}
# These processors cut a sound silently after `n_samples`. Others split it into windows.
_CUTS_SOUNDS = ("Qwen2AudioProcessor", "Qwen2_5OmniProcessor", "Qwen3OmniMoeProcessor", "WhisperProcessor")
_FPS = 2.0  # for frames without a clock; Qwen's models assume two frames per second


def prepare(
    form: PromptFormat, examples: Sequence[Example], *, texts: Sequence[str], config: Any = None
) -> dict[str, Tensor]:
    """Tokenize the texts of examples as one batch, padded on the left; for an encoder, on the right.

    With padding on the left, the last position of every row is the one that answers: special tokens that
    the tokenizer adds behind a text are dropped there. Raises `LensError`.
    """
    processor, texts = form.processor, list(texts)
    _check_media(form, examples, texts)
    encoder = getattr(config, "is_encoder_decoder", False) is True
    settings = _settings(form, texts, side="right" if encoder else "left")
    media = _media(processor, examples)
    with told("the processor can't read these examples"):
        if not media:
            batch = getattr(processor, "tokenizer", processor)(texts, **settings, return_tensors="pt")
        elif _takes_audio_only(form):
            batch = processor(**media, return_tensors="pt")
        elif type(processor).__module__.startswith("transformers."):
            # For the text alone, because the padding of sounds has settings of its own.
            batch = processor(text=texts, **media, text_kwargs=settings, return_tensors="pt")
        else:
            batch = processor(text=texts, **media, **settings, return_tensors="pt")
    # Some processors add training labels; a model given those would compute a loss.
    found = {name: t for name, t in batch.items() if isinstance(t, Tensor) and name != "labels"}
    _check_reached(found, examples, config=config)
    if not encoder and settings["add_special_tokens"] and "input_ids" in found:
        found = _unended(found, form.tokenizer)
    return _with_clocks(found, media, processor=processor)


def _unended(batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """Drop the special tokens behind each row: an end token would end the turn that is to be continued."""
    after = special_tokens(tokenizer)[1]
    ends = (tuple(row[-len(after) :]) == after for row in batch["input_ids"].tolist()) if after else ()
    return shortened(batch, [len(after) * end for end in ends])


def refuse_longer(batch: Mapping[str, Tensor], examples: Sequence[Example], *, config: Any) -> None:
    """Raise `LensError` for an example with more tokens than the config gives the model positions.

    Does nothing where the config's number is no limit: with scaled rotary positions, and with multimodal ones
    (mrope), where the tokens of a picture share a position.
    """
    text = config.get_text_config() if config is not None else None
    most = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [
        rope,
        *(part for part in rope.values() if isinstance(part, Mapping)),
    ]  # some models have one entry per kind of layer
    if any(one.get("rope_type", "default") != "default" or "mrope_section" in one for one in ropes):
        return
    if type(most) is not int or most <= 0 or "attention_mask" not in batch:
        return
    lengths = batch["attention_mask"].sum(-1).tolist()
    for example, length in zip(examples, lengths, strict=True):
        if length > most:
            raise LensError(
                f"example {quoted(example.id)} has {length:,} tokens, but config.json gives the model "
                f"{most:,} positions (max_position_embeddings); shorten the text"
            )


def _settings(form: PromptFormat, texts: Sequence[str], *, side: str) -> dict[str, bool | str]:
    """Return the settings of the tokenizer; set its padding token if it has none."""
    tokenizer = form.tokenizer
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise LensError("the tokenizer has no padding token and no end token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return {"padding": True, "padding_side": side, "add_special_tokens": form.adds_special_tokens(texts)}


def _media(processor: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Open the media of examples; return the arguments that a processor takes beside the texts."""
    media: dict[str, Any] = {}
    if any(example.images for example in examples):
        media["images"] = [[open_picture(image) for image in example.images] for example in examples]
    if any(example.audio for example in examples):
        media |= _sounds(processor, examples)
    if any(example.video for example in examples):
        media |= _films(examples)
    return media


def _sounds(processor: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Open the sounds of all examples, in order, at the processor's rate.

    Raises `TaskError` for a sound that can't be read, `LensError` for one that the processor would cut.
    """
    extractor = getattr(processor, "audio_processor", None) or processor.feature_extractor
    rate = int(extractor.sampling_rate)
    most = extractor.n_samples if type(processor).__name__ in _CUTS_SOUNDS else None
    sounds = []
    for example in examples:
        for source in example.audio:
            sounds.append(open_sound(source, rate))
            if most is not None and len(sounds[-1]) > most:
                raise LensError(
                    f"example {quoted(example.id)}: a sound of {len(sounds[-1]) / rate:.1f} s, but the model "
                    f"takes {most / rate:g} s at most; cut it"
                )
    return {"audio": sounds, "sampling_rate": rate}


def _films(examples: Sequence[Example]) -> dict[str, Any]:
    """Open the films of all examples, in order, with the time of each frame. Raises `TaskError`."""
    from transformers.video_utils import VideoMetadata

    films = [open_film(source) for example in examples for source in example.video]
    times = [
        VideoMetadata(
            total_num_frames=len(film.frames),
            fps=film.fps or _FPS,
            duration=len(film.frames) / (film.fps or _FPS),
            frames_indices=list(range(len(film.frames))),
        )
        for film in films
    ]
    # The frames are sampled already; by default a processor would sample them a second time.
    settings = {"do_sample_frames": False, "video_metadata": times}
    return {
        "videos": [np.stack([np.asarray(frame) for frame in film.frames]) for film in films],
        "videos_kwargs": settings,
    }


def _with_clocks(
    batch: Mapping[str, Tensor], media: Mapping[str, Any], *, processor: Any
) -> dict[str, Tensor]:
    """Return the batch with each film's own seconds per step: some processors use one for all films."""
    found = dict(batch)
    if "video_second_per_grid" in found:
        steps = processor.video_processor.temporal_patch_size
        times = media["videos_kwargs"]["video_metadata"]
        found["video_second_per_grid"] = torch.tensor([steps / time.fps for time in times])
    return found


def _check_media(form: PromptFormat, examples: Sequence[Example], texts: Sequence[str]) -> None:
    """Raise `LensError` unless each text has one placeholder for each of its media."""
    kind = type(form.processor).__name__
    for example, text in zip(examples, texts, strict=True):
        if example.audio and _takes_audio_only(form):
            if text.strip():
                raise LensError(
                    f"example {quoted(example.id)}: {kind} takes sounds without text, but the text is "
                    f"{quoted(text)}; leave prompt and text empty"
                )
            continue
        for medium, count in example.media.items():
            one, many = _WORDS[medium]
            token = form.placeholder(medium)
            if token is None and count:
                takes = [_WORDS[other][1] for other in MEDIA if form.placeholder(other)]
                more = f" ({form.unread})" if form.unread else ""
                raise LensError(
                    f"example {quoted(example.id)} has {one}, but {kind} takes "
                    f"{' and '.join(['text', *takes]) if takes else 'text only'}{more}"
                )
            places = text.count(token) if token else 0
            if places != (0 if kind in ADDS_PLACEHOLDERS else count):
                raise LensError(
                    f"example {quoted(example.id)}: the prompt has {places} placeholders for {many} "
                    f"({token}), but the example has {count} {many}"
                )


def _check_reached(batch: Mapping[str, Tensor], examples: Sequence[Example], *, config: Any) -> None:
    """Raise `LensError` for media without a position in the input, and for positions without a medium.

    Some processors put the frames of a film at the positions of pictures.
    """
    if "input_ids" not in batch:
        return
    found = spans(batch["input_ids"], batch.get("attention_mask"), config=config)
    there = {medium: found[medium].any(1).tolist() for medium in MEDIA if medium in found}
    for row, example in enumerate(examples):
        seen = {medium for medium in there if there[medium][row]}
        for medium, count in example.media.items():
            one, many = _WORDS[medium]
            frames = medium == "image" and bool(example.video)
            if medium in seen and not count and not frames:
                raise LensError(
                    f"example {quoted(example.id)}: its text has placeholders for {many}, but the example "
                    f"has no {many}"
                )
            if (
                count
                and medium in there
                and medium not in seen
                and not (medium == "video" and "image" in seen)
            ):
                raise LensError(
                    f"example {quoted(example.id)}: the model's input has no position for {one}. Does "
                    f"config.json name the right placeholder token?"
                )


def _takes_audio_only(form: PromptFormat) -> bool:
    """Return whether a processor takes sounds without a text, as Whisper's does."""
    return (
        form.placeholder("audio") is None
        and not getattr(form.processor, "image_processor", None)
        and (getattr(form.processor, "feature_extractor", None) is not None)
    )
