"""Batches whose pictures and sounds are padded to those beside them, each with the same rows alone."""

from collections.abc import Callable

import torch

from tests.lens.families import (
    AUDIO,
    BY_NAME,
    IMAGE,
    Batch,
    Family,
    noise,
    words,
)

Padded = tuple[list[Batch], Batch]
_WORD = 7
_PICTURE = {"image_token_id": IMAGE, "vision_config.patch_size": 8, "vision_config.image_size": 32}
_HEARD = {"audio_token_id": AUDIO, "audio_config.num_mel_bins": 16, "audio_config.max_source_positions": 16}
_SIZE = {"image_token_index": IMAGE, "vision_config.image_size": 56, "vision_config.patch_size": 14}


def _none(made: torch.Generator) -> Batch:
    raise NotImplementedError


# Families whose batches are below; the others are in `families.py`.
_MORE = (
    Family("voxtral", "voxtral", _none, changes={**_HEARD, "audio_config.intermediate_size": 256}),
    Family("audioflamingo3", "audioflamingo3", _none, changes=_HEARD),
    Family("mistral3", "mistral3", _none,
           changes={**_SIZE, "spatial_merge_size": 2, "vision_config.head_dim": 16}),
    Family("lfm2_vl", "lfm2_vl", _none,
           changes={"image_token_id": IMAGE, "vision_config.patch_size": 14,
                    "vision_config.num_patches": 16}),
    Family("idefics2", "idefics2", _none,
           changes={**_PICTURE, "perceiver_config.resampler_n_latents": 4,
                    "perceiver_config.resampler_head_dim": 16, "perceiver_config.resampler_depth": 1,
                    "perceiver_config.num_key_value_heads": 2}),
    Family("mllama", "mllama", _none, "MllamaForConditionalGeneration",
           changes={**_SIZE, "vision_config.image_size": 28, "vision_config.num_global_layers": 1,
                    "vision_config.max_num_tiles": 4, "vision_config.intermediate_layers_indices": [0],
                    "text_config.cross_attention_layers": [1], "vision_config.vision_output_dim": 128}),
)  # fmt: skip
FAMILY = {**BY_NAME, **{family.name: family for family in _MORE}}


def _made() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _rows(batch: Batch) -> list[Batch]:
    return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in (0, 1)]


def _fewer(batch: Batch, token: int, kept: int) -> Batch:
    """Return the batch with some placeholders of the first row replaced by a word."""
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == token).nonzero().flatten()[kept:]] = _WORD
    return {**batch, "input_ids": ids}


def _heard(name: str, mask: str, kept: int) -> Padded:
    """Return 20 of 32 frames in the first row."""
    own = torch.ones(2, 32, dtype=torch.long)
    own[0, 20:] = 0
    batch = {**words(_made(), (AUDIO, 8)), "input_features": noise(_made(), 2, 16, 32), mask: own}
    batch["input_features"][0, :, 20:] = 0
    batch = _fewer(batch, AUDIO, kept)
    return _rows(batch), batch


def _silent(batch: Batch, frames: int) -> Padded:
    """Return sounds without a mask, of which the first ends in equal frames."""
    features = batch["input_features"].clone()
    features[0, :, frames:] = -1
    batch = {**batch, "input_features": features}
    return _rows(batch), batch


def _omni() -> Padded:
    family = FAMILY["qwen2_5_omni"].batch()
    heard = _heard("", "feature_attention_mask", 5)[1]
    batch = {
        **_fewer(family, AUDIO, 5),
        **{n: heard[n] for n in ("input_features", "feature_attention_mask")},
    }
    rows = _rows(batch)
    for number, row in enumerate(rows):
        row["pixel_values"] = batch["pixel_values"][16 * number : 16 * number + 16]
    return rows, batch


def _cut(name: str) -> Padded:
    """Return pictures of which one has half the height of the others."""
    batch = {**words(_made(), (IMAGE, 8)), "pixel_values": noise(_made(), 2, 2, 3, 32, 32)}
    batch["pixel_attention_mask"] = torch.ones(2, 2, 32, 32, dtype=torch.long)
    batch["pixel_values"][0, 1, :, 16:] = 0
    batch["pixel_attention_mask"][0, 1, 16:] = 0
    return _rows(batch), batch


def _dropped(name: str) -> Padded:
    """Return one picture in the first row and two in the second."""
    batch = _fewer(_cut(name)[1], IMAGE, 4)
    batch["pixel_values"][0, 1] = batch["pixel_attention_mask"][0, 1] = 0
    rows = _rows(batch)
    rows[0] = {n: t[:, :1] if n.startswith("pixel") else t for n, t in rows[0].items()}
    return rows, batch


def _pixtral() -> Padded:
    batch = {**words(_made(), (IMAGE, 4)), "pixel_values": noise(_made(), 2, 3, 56, 56)}
    batch["image_sizes"] = torch.tensor([[28, 56], [56, 56]])
    batch["pixel_values"][0, :, 28:] = 0
    batch = _fewer(batch, IMAGE, 2)
    rows = _rows(batch)
    rows[0]["pixel_values"] = rows[0]["pixel_values"][:, :, :28]
    return rows, batch


def _navit() -> Padded:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, 8:] = 0
    batch = {
        **words(_made(), (IMAGE, 4)),
        "pixel_values": noise(_made(), 2, 16, 3 * 14 * 14) * mask[..., None],
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[2, 4], [4, 4]]),
    }
    batch = _fewer(batch, IMAGE, 2)
    return _rows(batch), batch


def tiled() -> Batch:
    """Return pictures of one and of two tiles, padded to four, for Mllama."""
    batch = {**words(_made(), (IMAGE, 1)), "pixel_values": noise(_made(), 2, 1, 4, 3, 28, 28)}
    shown = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 0]]])
    return {
        **batch,
        "pixel_values": batch["pixel_values"] * shown[..., None, None, None],
        "aspect_ratio_ids": torch.tensor([[1], [6]]),
        "aspect_ratio_mask": shown,
        "cross_attention_mask": torch.ones(2, batch["input_ids"].shape[1], 1, 4, dtype=torch.long),
    }


CASES: dict[str, tuple[str, Callable[[], Padded]]] = {
    "a mask of frames": ("qwen2_audio", lambda: _heard("", "feature_attention_mask", 5)),
    "a mask of frames of another name": ("audioflamingo3", lambda: _heard("", "input_features_mask", 5)),
    "sounds in chunks": ("qwen2_5_omni", _omni),
    "a sound that ends in silence": ("whisper", lambda: _silent(FAMILY["whisper"].batch(), 40)),
    "silence, and four positions in a row": (
        "voxtral",
        lambda: _silent({**words(_made(), (AUDIO, 4)), "input_features": noise(_made(), 2, 16, 32)}, 20),
    ),
    "part of a picture": ("idefics3", lambda: _cut("idefics3")),
    "part of a picture in SmolVLM": ("smolvlm", lambda: _cut("smolvlm")),
    "part of a picture before a resampler": ("idefics2", lambda: _cut("idefics2")),
    "a picture that is dropped": ("idefics3", lambda: _dropped("idefics3")),
    "a picture that is dropped in SmolVLM": ("smolvlm", lambda: _dropped("smolvlm")),
    "pictures of several sizes": ("mistral3", _pixtral),
    "patches of several pictures": ("lfm2_vl", _navit),
}
