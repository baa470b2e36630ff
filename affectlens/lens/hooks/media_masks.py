"""Read from the arguments of a call which parts of its pictures and sounds are padding.

arguments of a model, a tower or a layer ──▶ masks: true for what is no padding ── fitted ──▶ to a tensor
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

Lengths = Callable[[Tensor], Any]  # from frames to the positions that a tower makes of them, at each stage

_SOUNDS = ("feature_attention_mask", "input_features_mask", "audio_attention_mask", "input_values_mask")
_PICTURES = ("patch_attention_mask", "pixel_attention_mask", "pixel_mask", "aspect_ratio_mask")
_PADDING = {"audio_mel_mask": "audio", "padding_positions": "vision"}  # here true means padding
_TEXTS = ("input_ids", "inputs_embeds")


def arguments(module: nn.Module, args: Sequence[Any], *, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a call by the names that the module gives them."""
    names = inspect.signature(module.forward).parameters
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def masks(module: nn.Module, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each mask of a call, (row, …), true for what is no padding, with the medium that it is about."""
    for name in _SOUNDS:
        if name in given:
            yield "audio", given[name].bool()
    for name in _PICTURES:
        if name in given:
            yield "vision", _shown(given[name].bool(), given)
    for name, medium in _PADDING.items():
        if name in given:
            yield medium, ~given[name].bool()
    if "pixel_position_ids" in given:  # (picture, patch, 2), -1 for padding
        yield "vision", (given["pixel_position_ids"] != -1).any(-1)
    if "image_sizes" in given and hasattr(module, "patch_conv"):  # of Pixtral: pictures padded to the largest
        yield (
            "vision",
            _of_sizes(given["image_sizes"], given["pixel_values"], patch=_number(module.patch_size)),
        )
    if "aspect_ratio_mask" in given and hasattr(module, "num_patches"):  # of Mllama
        yield "vision", _of_tiles(given["aspect_ratio_mask"], _number(module.num_patches))
    if "feature_lens" in given and hasattr(module, "n_window"):
        yield "audio", _of_chunks(given["feature_lens"], 2 * _number(module.n_window))
    if "attention_mask" in given and not any(name in given for name in _TEXTS):
        yield from (("", one) for one in _of_attention(given["attention_mask"]))


def silent_ends(given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the mask of sounds without one: frames at the end that are all equal are padding.

    Whisper's processor pads with zeros to 30 s and passes no mask. Digital silence looks the same to a model.
    """
    features = given.get("input_features")
    if features is None or features.ndim != 3:
        return
    same = (features == features[:, :, -1:]).all(1).flip(1)  # (sound, frame), from the end
    equal = same.cumprod(1).sum(1)
    own = features.shape[2] - torch.where(equal > 1, equal, 0)
    yield "audio", _prefix(own, features.shape[2])


def fitted(valid: Tensor, sizes: Sequence[int], *, lengths: Lengths | None = None) -> Tensor | None:
    """Return a mask for a tensor of sizes (row, position, …) without its features; None if it fits none.

    The tensor may have another resolution: after convolutions, pooling, or in patches instead of pixels. Of
    a mask with fewer dimensions each entry stands for a whole part of the tensor.
    """
    for stage in _stages(valid, lengths):
        if (found := _alike(stage, sizes)) is not None:
            return found
    if valid.ndim == 3 and (found := _in_patches(valid, sizes)) is not None:
        return found
    if valid.ndim == 2 and len(sizes) == 2 and sizes[0] == len(valid) and 1 < sizes[1] < valid.shape[1]:
        step = -(-valid.shape[1] // sizes[1])
        if -(-valid.shape[1] // step) == sizes[1]:
            return valid[:, ::step]
    return _grouped(valid, sizes, lengths)


def _alike(valid: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Return the mask where its shape, or its flattened shape, is that of the first dimensions."""
    ways: list[Tensor] = [valid, *([valid.flatten(0, 1)] if valid.ndim > 2 else []), valid.flatten()]
    for one in ways:
        if tuple(one.shape) == tuple(sizes[: one.ndim]):
            return one
    many = sizes[-1]
    if len(sizes) in (1, 2) and sizes[0] in (1, many) and many == int(valid.sum()):  # packed without padding
        return torch.ones(tuple(sizes), dtype=torch.bool, device=valid.device)
    return None


def _stages(valid: Tensor, lengths: Lengths | None) -> Iterator[Tensor]:
    """Yield a mask of frames, then the masks of the positions that a tower makes of them."""
    yield valid
    if lengths is None or valid.ndim != 2:
        return
    own = valid.sum(1)
    if not torch.equal(valid, _prefix(own, valid.shape[1])):
        return
    for whole, some in zip(
        _tuple(lengths(own.new_tensor(valid.shape[1]))), _tuple(lengths(own)), strict=True
    ):
        yield _prefix(some, int(whole))


def _in_patches(valid: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Return the mask of patches, (picture, height, width) or flat, of a mask of pixels or smaller patches.

    A patch is padding if all of it is. In a mask of patches all pixels of a patch are alike.
    """
    height, width = valid.shape[1:]
    if sizes[0] != len(valid):
        return None
    if len(sizes) == 3 and height % sizes[1] == 0 and width % sizes[2] == 0:
        return _pooled(valid, height // sizes[1], width // sizes[2])
    if len(sizes) == 3 and sizes[1] % height == 0 and sizes[2] % width == 0:
        tall = valid.repeat_interleave(sizes[1] // height, 1)
        return tall.repeat_interleave(sizes[2] // width, 2)
    for side in range(1, min(height, width) + 1):
        fits = height % side == 0 == width % side and height * width == sizes[1] * side * side
        if len(sizes) == 2 and fits:
            return _pooled(valid, side, side).flatten(1)
    return None


def _pooled(valid: Tensor, height: int, width: int) -> Tensor:
    """Return which blocks of a mask of pictures have an entry that is true."""
    blocks = "picture (rows height) (columns width) -> picture rows columns"
    return reduce(valid, blocks, torch.any, height=height, width=width)


def _grouped(valid: Tensor, sizes: Sequence[int], lengths: Lengths | None) -> Tensor | None:
    """Return the mask of rows that each hold several positions, or of positions that share an entry."""
    for stage in (*_stages(valid, lengths),)[::-1]:
        if len(sizes) == 1 and sizes[0] < stage.numel() and stage.numel() % sizes[0] == 0:
            return stage.reshape(sizes[0], -1).any(1)
    if valid.ndim == 3 and len(sizes) == 2 and sizes[0] == len(valid):  # tiles of pictures in a row
        tiles = valid.flatten(1)
        if sizes[1] % tiles.shape[1] == 0:
            return tiles.repeat_interleave(sizes[1] // tiles.shape[1], 1)
    return None


def _shown(mask: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Return a mask of pixels without pictures that are all zero: the Idefics family drops those."""
    pixels = given.get("pixel_values")
    if mask.ndim != 4 or pixels is None or pixels.ndim != 5:
        return mask
    shown = pixels.flatten(0, 1).flatten(1).any(1)
    return mask.flatten(0, 1)[shown] if bool(shown.any()) else mask.flatten(0, 1)[:1]


def _of_attention(mask: Tensor) -> Iterator[Tensor]:
    """Yield what an attention mask says of padding: a token that is none sees itself."""
    if mask.ndim == 4 and mask.shape[2] == mask.shape[3]:
        itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        yield itself if itself.dtype == torch.bool else itself > torch.finfo(itself.dtype).min / 2
    elif mask.ndim == 4:  # learned queries, none of which is padding, attend to a tower
        yield mask.new_ones(mask.shape[0], mask.shape[2], dtype=torch.bool)
    elif mask.ndim in (2, 3) and not mask.is_floating_point():
        yield mask.bool()


def _of_sizes(sizes: Tensor, pixels: Tensor, *, patch: int) -> Tensor:
    """Return the mask of the patches of pictures of these sizes, padded to the largest."""
    height, width = (_prefix(sizes[:, n] // patch, pixels.shape[n - 2] // patch) for n in (0, 1))
    return height[:, :, None] & width[:, None]


def _of_tiles(shown: Tensor, patches: int) -> Tensor:
    """Return the mask of a picture's patches, of all tiles: each tile is padded to a multiple of 8."""
    own = torch.arange(-(-patches // 8) * 8, device=shown.device) < patches
    return (shown.bool().flatten(0, 1)[:, :, None] & own).flatten(1)


def _of_chunks(frames: Tensor, size: int) -> Tensor:
    """Return the mask of sounds that are cut into chunks, the last one of each padded."""
    counts = [size if left >= size else left for n in frames.tolist() for left in range(n, 0, -size)]
    return _prefix(frames.new_tensor(counts), size)


def _prefix(counts: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=counts.device) < counts[:, None]


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _number(setting: object) -> int:
    assert isinstance(setting, int)
    return setting
