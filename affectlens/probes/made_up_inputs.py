"""Make up inputs that a tower may accept: words, pictures, sounds, in the sizes that its config names."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 8
Inputs = dict[str, Tensor]  # by the names of a forward method's arguments


def guesses(tower: nn.Module) -> Iterator[dict[str, Tensor | bool]]:
    """Yield made-up inputs for a tower, the likeliest first; many of them it will not accept."""
    try:
        wanted = inspect.signature(tower.forward).parameters
    except (TypeError, ValueError):
        return
    config = getattr(tower, "config", None)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {n for n, p in wanted.items() if p.default is p.empty and p.kind not in kinds}
    quiet = {"use_cache": False} if "use_cache" in wanted else {}
    first = str(getattr(tower, "main_input_name", "input_ids"))
    for make in dict.fromkeys((_text, _MAKERS.get(first, _picture), *_MAKERS.values(), _embedded)):
        for guess in _until_it_fails(make(tower, config)):
            # Only named arguments: a tower may pass on what it does not name, to a module that breaks on it.
            given = {k: v for k, v in guess.items() if k in wanted and v is not None}
            if given and needed <= given.keys() and (make is not _text or "input_ids" in given):
                yield {**given, **quiet}


def _until_it_fails(guesses: Iterator[Inputs]) -> Iterator[Inputs]:
    """Yield guesses up to the first that a strange config makes impossible."""
    try:
        yield from guesses
    except Exception:
        return


def _first(config: Any, *names: str, default: Any = None) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), default)


def _dtype(tower: nn.Module) -> torch.dtype:
    found = (p.dtype for p in tower.parameters() if p.is_floating_point())
    return next(found, torch.float32)


def _random(tower: nn.Module, *shape: int) -> Tensor:
    where = next(iter(tower.parameters())).device
    return torch.randn(shape).to(device=where, dtype=_dtype(tower))


def _whole(tower: nn.Module, values: Any) -> Tensor:
    return torch.tensor(values, device=next(iter(tower.parameters())).device)


def _text(tower: nn.Module, config: Any) -> Iterator[Inputs]:
    rows = [p.shape[0] for m in tower.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
    size = _first(config, "vocab_size", "n_vocab", default=None)
    try:
        size = tower.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except Exception:  # some models have no input embeddings
        size = size if isinstance(size, int) else max(rows, default=64)
    media = _special(config.to_dict()) if hasattr(config, "to_dict") else set()
    # Ids that stand for media would ask for the media.
    plain = [n for n in range(3, size) if n not in media] or [0]
    ids = _whole(tower, [[plain[n] for n in torch.randint(len(plain), (_TOKENS,)).tolist()]])
    ones = torch.ones_like(ids)
    yield {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    yield {"input_ids": ids, "attention_mask": ones, "decoder_input_ids": ids.flip(1)}
    yield {"input_ids": ids}
    yield {"input_ids": ids, "attention_mask": ones, "token_type_ids": torch.zeros_like(ids)}
    yield {
        "input_ids": ids,
        "mm_token_type_ids": torch.zeros_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    for picture in _picture(tower, config):
        yield {"input_ids": ids, "attention_mask": ones, **picture}
    for length in (16, 32, 64):  # some models attend in blocks of this length
        yield {"input_ids": ids.repeat(1, length // _TOKENS)}


def _special(config: Any) -> set[int]:
    """Return the ids of media and of ends of texts, from anywhere in a config."""
    if not isinstance(config, dict):
        return set()
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special(value)
        elif str(key).endswith(("_token_id", "_token_index", "_token")):
            found |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    return found


def _embedded(tower: nn.Module, config: Any) -> Iterator[Inputs]:
    width = _first(config, "hidden_size", "d_model", "n_embd")
    if isinstance(width, int):
        states = _random(tower, 1, _TOKENS, width)
        yield {"inputs_embeds": states}
        yield {"hidden_states": states}
        yield {"inputs_embeds": states, "attention_mask": torch.ones(1, _TOKENS, dtype=torch.long)}
        yield {"query_embeds": states, "encoder_hidden_states": states}
        yield {"hidden_states": states, "encoder_hidden_states": states}


def _picture(tower: nn.Module, config: Any) -> Iterator[Inputs]:
    config = _first(config, "vision_config", default=config)
    channels = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    patch = _first(config, "patch_size", "spatial_patch_size", default=16)
    size = _first(config, "image_size", "img_size", "max_image_size", default=None)
    patch = patch[0] if isinstance(patch, (tuple, list)) else patch
    high, wide = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    sizes = [(high, wide)] if isinstance(high, int) and isinstance(wide, int) else []
    if not all(isinstance(n, int) for n in (channels, patch)):
        return
    sizes += [(4 * patch, 4 * patch), (224, 224)]
    for high, wide in dict.fromkeys(sizes):
        if max(high, wide) > 640:  # slow, and smaller ones serve as well
            continue
        picture = _random(tower, 1, channels, high, wide)
        yield {"pixel_values": picture, "hidden_states": picture}
        yield {"pixel_values": picture, "image_sizes": _whole(tower, [[high, wide]])}
        frames = _first(config, "num_frames", default=4)
        yield {"pixel_values": picture.unsqueeze(1).repeat(1, frames, 1, 1, 1)}
        yield {"pixel_values_videos": picture.unsqueeze(1).repeat(1, frames, 1, 1, 1)}
        yield _tiled(tower, config, picture)
    yield from _patches(tower, config, channels * patch * patch)


def _tiled(tower: nn.Module, config: Any, picture: Tensor) -> Inputs:
    tiles = _first(config, "max_num_tiles", default=1)
    return {
        "pixel_values": picture[None, :, None].repeat(1, 1, tiles, 1, 1, 1),
        "aspect_ratio_ids": _whole(tower, [[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
    }


def _patches(tower: nn.Module, config: Any, per_frame: int) -> Iterator[Inputs]:
    """Yield a picture as flat patches, with its height and width in patches."""
    frames = _first(config, "temporal_patch_size", default=1)
    side = (
        2 * int(_first(config, "spatial_merge_size", "merge_kernel_size", default=2))
        if isinstance(_first(config, "spatial_merge_size", "merge_kernel_size", default=2), int)
        else 4
    )
    grid = _whole(tower, [[1, side, side]])
    for depth in dict.fromkeys((frames, 1)):
        flat = _random(tower, side * side, per_frame * depth)
        for name in ("grid_thw", "image_grid_thw", "grid_hws", "image_grid_hws"):
            yield {"hidden_states": flat, "pixel_values": flat, name: grid}
        yield {
            "pixel_values": flat.unsqueeze(0),
            "spatial_shapes": grid[:, 1:],
            "attention_mask": torch.ones(1, side * side, dtype=torch.long),
            "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
        }
        spots = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
        yield {"pixel_values": flat.unsqueeze(0), "pixel_position_ids": spots, "image_position_ids": spots}


def _sound(tower: nn.Module, config: Any) -> Iterator[Inputs]:
    config = _first(config, "audio_config", "encoder_config", "speech_config", default=config)
    bins = _first(
        config,
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        "input_size",
        "input_feat_size",
        "n_mels",
        default=80,
    )
    if not isinstance(bins, int):
        return
    longest = _first(config, "max_source_positions", default=None)
    counts = [2 * longest] if isinstance(longest, int) and longest <= 1500 else []
    window = _first(config, "n_window", default=None)
    counts += [2 * window] if isinstance(window, int) else []
    for count in dict.fromkeys((*counts, 64, 200)):
        sound = _random(tower, 1, bins, count)
        mask = torch.ones(1, count, dtype=torch.bool)
        lengths = {"feature_lens": _whole(tower, [count]), "aftercnn_lens": _whole(tower, [(count + 1) // 2])}
        words = {"decoder_input_ids": _whole(tower, [[3, 4, 5, 6, 7]])}
        for features in (sound, sound.mT):
            whole = {"input_features": features, "hidden_states": features, "audio_mel": features, **words}
            yield whole
            yield {**whole, "attention_mask": mask, "input_features_mask": mask, "audio_mel_mask": ~mask}
            yield {**whole, "attention_mask": mask.long(), "input_features_mask": mask.long(), "mask": mask}
        yield {"input_features": sound[0], "hidden_states": sound[0], **lengths}


def _wave(tower: nn.Module, config: Any) -> Iterator[Inputs]:
    for count in (2000, 16000):
        wave, words = _random(tower, 1, count), {"decoder_input_ids": _whole(tower, [[3, 4, 5, 6, 7]])}
        mask = torch.ones(1, count, dtype=torch.long)
        yield {"input_values": wave, **words}
        yield {"input_values": wave, "attention_mask": mask, "padding_mask": mask, **words}
        yield {"input_values": wave.unsqueeze(1), **words}
    high, wide = _first(config, "max_length", default=128), _first(config, "num_mel_bins", default=128)
    if isinstance(high, int) and isinstance(wide, int) and high * wide < 300_000:
        yield {"input_values": _random(tower, 1, high, wide)}


_MAKERS = {
    "input_ids": _text,
    "pixel_values": _picture,
    "pixel_values_videos": _picture,
    "input_features": _sound,
    "input_values": _wave,
}
