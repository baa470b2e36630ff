"""8-bit weights: FP8 and int8 numbers beside the scales that multiply them, found by their names.

    quantized ── tensor, scheme ──▶ scaled ──▶ Found(name, parts, Packed or the reason why not)

One stored number for each element, and one scale for a tensor, a row, or a block of rows and columns.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from affectlens.checkpoints.four_bit import Found, Packed, finite, multiply, powers, raw
from affectlens.checkpoints.store import Store

if TYPE_CHECKING:
    from torch import Tensor

_FP8 = ("float8_e4m3fn", "float8_e5m2")
_PACKED = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
# Names of parameters; other integers, such as positions or masks, are what they are.
_WEIGHT = re.compile(r"weight|bias|\w+_(?:proj|weight)|w[123io](?:_[01])?|Wi")
_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
_MULTIPLIED = ("_scale_inv", "_scale", ".scale", ".qscale_weight")  # DeepSeek-V3's `_inv` is multiplied too
_NAMED = 4  # tensors listed
_PIECE = 2**22  # numbers multiplied at a time


class Scheme(NamedTuple):
    """How a config describes the quantisation, and whether there is any sign of one."""

    method: str
    format: str
    block: tuple[int, int] | None  # None if the stated block is invalid
    silent: bool  # neither the config nor a tensor's name mentions scales


def scheme_of(store: Store) -> Scheme:
    """Read the quantisation scheme of a store from its config and tensor names."""
    section = store.config.get("text_config")
    found = store.config.get("quantization_config") or (
        section.get("quantization_config") if isinstance(section, Mapping) else None
    )
    known: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    # DeepSeek-V3 introduced blocks of 128 × 128; a config that names no block means these.
    stated = known.get("weight_block_size") or _compressed_block(known) or [128, 128]
    sides = stated if isinstance(stated, list) and all(type(n) is int and n > 0 for n in stated) else []
    block = (sides[0], sides[1]) if len(sides) == 2 else None
    silent = not found and not any("scale" in _split(tensor)[1] for tensor in store.headers)
    method, kind = str(known.get("quant_method", "")), str(known.get("format", ""))
    return Scheme(method, kind, block, silent)


def scaled(store: Store, tensor: str, *, scheme: Scheme) -> Found | None:
    """Find the weight of small numbers that a tensor stores; None if it is not one."""
    if ".lora_" in tensor:  # whoever reads factors says what they must be
        return None
    (shape, dtype), (module, leaf) = store.headers[tensor], _split(tensor)
    parts = (tensor, *_beside(store, tensor))
    if dtype.startswith("float8_") and dtype != "float8_e8m0fnu":
        return Found(tensor, parts, _by_scale(store, parts, scheme))
    if dtype not in _PACKED or len(shape) < (1 if leaf in ("weight", "bias") else 2):
        return None
    if dtype == "int8" and leaf == "weight" and f"{module}.SCB" in store.headers:
        return _int8(store, tensor, module)
    if len(parts) == 1 and not _WEIGHT.fullmatch(leaf):
        return None
    if dtype == "int8" and (scheme.method, scheme.format) == ("compressed-tensors", "int-quantized"):
        return Found(tensor, parts, _by_scale(store, parts, scheme))
    return Found(tensor, parts, f"{dtype} numbers in an unknown packing{_more(store, tensor)}")


def _compressed_block(known: Mapping[str, Any]) -> object:
    groups = known.get("config_groups")
    kinds = groups.values() if isinstance(groups, Mapping) else ()
    weights = [kind.get("weights") for kind in kinds if isinstance(kind, Mapping)]
    blocks = [w["block_structure"] for w in weights if isinstance(w, Mapping) and w.get("block_structure")]
    # With different blocks per group, only patterns of names say which applies: not supported.
    return blocks[0] if blocks and all(block == blocks[0] for block in blocks) else blocks


def _split(tensor: str) -> tuple[str, str]:
    module, _, leaf = tensor.rpartition(".")
    return module, leaf


@dataclass(frozen=True)
class _Scaled:
    """A weight with one stored number for each element, and one scale for each block of elements."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    scale: str | None  # None if the stored numbers are the values
    grid: tuple[int, ...] = ()  # number of blocks along each dimension
    block: tuple[int, ...] = ()  # length of a block along each dimension
    factor: float = 1.0

    def read(self, store: Store, *, first: int, last: int) -> "Tensor":
        import torch

        values = torch.empty(last - first, *self.shape[1:], dtype=torch.float32)
        step = max(1, _PIECE // max(1, math.prod(self.shape[1:])))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            piece = values[begin - first : end - first]
            piece.copy_(store.read(self.tensor, slice(begin, end)))
            if self.scale is not None:
                multiply(piece, self._scales(store, self.scale, begin=begin, end=end), width=self.block[-1])
        return values

    def _scales(self, store: Store, scale: str, *, begin: int, end: int) -> "Tensor":
        """Return the scales of some rows, spread over all dimensions but the last."""
        import torch

        many, tall = self.grid[0] > 1, self.block[0]
        held = store.read(scale, slice(begin // tall, -(-end // tall)) if many else None).cpu()
        held = powers(held) if held.dtype == torch.uint8 else held.float()
        scales = held.reshape(len(held) if many else 1, *self.grid[1:]) * self.factor
        if many and tall > 1:
            scales = scales[torch.arange(begin, end) // tall - begin // tall]
        for dim in range(1, len(self.grid) - 1):
            if self.grid[dim] > 1 and self.block[dim] > 1:
                scales = scales.repeat_interleave(self.block[dim], dim=dim).narrow(dim, 0, self.shape[dim])
        return scales


def _beside(store: Store, tensor: str) -> tuple[str, ...]:
    """Return the tensors beside a weight that could scale it."""
    names = [f"{tensor}_scale_inv", f"{tensor}_scale", f"{tensor}_scales", f"{tensor}_zero_point"]
    module, leaf = _split(tensor)
    if leaf == "weight":
        names += [f"{module}.scale", f"{module}.qscale_weight", f"{module}.weight_format"]
    return tuple(name for name in names if name in store.headers)


def _more(store: Store, tensor: str) -> str:
    """Name the tensors that a module has beside a weight: one of them may be a scale of an unknown name."""
    module, leaf = _split(tensor)
    beside = f"{module}." if module else ""
    names = (name.removeprefix(beside) for name in store.headers if name.startswith(beside))
    found = sorted(name for name in names if "." not in name and name not in (leaf, "bias"))
    return f" of a known name (beside it: {', '.join(found[:_NAMED])})" if module and found else ""


def _by_scale(store: Store, parts: tuple[str, ...], scheme: Scheme) -> Packed | str:
    """Describe a weight that its scales multiply, or return why it can't be read."""
    tensor, *beside = parts
    shape, dtype = store.headers[tensor]
    if dtype not in (*_FP8, "int8"):
        return f"{dtype} is not supported"
    if not shape or tensor.endswith(("scale", "scale_inv")):
        return f"{dtype}, but not a weight"
    if not beside:
        plain = scheme.silent and dtype in _FP8 and not _WEIGHT.fullmatch(_split(tensor)[1])
        own = _Scaled(tensor, shape, dtype, None)
        return own if plain else f"{dtype} without a scale{_more(store, tensor)}"
    if len(beside) > 1 or not beside[0].endswith(_MULTIPLIED):
        return f"{dtype} beside {', '.join(_split(name)[1] for name in beside)}"
    scale = store.headers[beside[0]]
    if scale.dtype not in _SCALES:
        return f"{dtype} with {_split(beside[0])[1]} of {scale.dtype}"
    laid = _grid(shape, scale.shape, scheme)
    if laid is None:
        return f"{dtype} {shape}, but {_split(beside[0])[1]} {scale.shape} doesn't fit it"
    if not finite(store, beside[0]):
        return f"{dtype}, but {_split(beside[0])[1]} is not finite"
    return _Scaled(tensor, shape, dtype, beside[0], *laid)


def _int8(store: Store, tensor: str, module: str) -> Found:
    """Describe an LLM.int8 weight (Dettmers et al. 2022): number / 127 × the largest magnitude of its row."""
    scale, order = f"{module}.SCB", f"{module}.weight_format"
    parts = tuple(part for part in (tensor, scale, order) if part in store.headers)
    shape, stored = store.headers[tensor].shape, store.headers[scale]
    packed: Packed | str = _Scaled(
        tensor, shape, "int8", scale, (shape[0], 1), (1, max(1, shape[1])), 1 / 127
    )
    if len(shape) != 2 or stored.dtype != "float32" or stored.shape != shape[:1]:
        packed = f"int8 {shape}, but SCB {stored.shape} of {stored.dtype} doesn't fit it"
    elif order in parts and (math.prod(store.headers[order].shape) != 1 or any(raw(store, order))):
        packed = "int8, but not stored row by row"
    elif not finite(store, scale):
        packed = "int8, but SCB is not finite"
    return Found(tensor, parts, packed)


def _grid(
    shape: tuple[int, ...], scale: tuple[int, ...], scheme: Scheme
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the number of blocks along each dimension and their lengths; None if the scale doesn't fit."""
    rank = len(shape)
    if math.prod(scale) == 1:
        scale = (1,) * rank
    elif scale == shape[:1] and (rank == 2 or shape[0] not in shape[1:]):
        scale = (*scale, *[1] * (rank - 1))  # one for each output channel or expert
    if len(scale) != rank or (rank == 1 and scale != (1,)):
        return None
    if rank > 1 and scheme.block and scale == (*shape[:-2], *map(_ceil, shape[-2:], scheme.block)):
        return scale, (*[1] * (rank - 2), *map(min, scheme.block, (max(1, n) for n in shape[-2:])))
    if rank == 3 and scale[2] == 1 < scale[1]:
        # fbgemm transposes the scales of Llama-4's experts: (experts, out, 1) for (experts, in, out).
        turned = scheme.method == "fbgemm_fp8"
        if not scheme.method and shape[1] == shape[2]:
            return None
        scale = (scale[0], 1, scale[1]) if turned else scale
    alike = all(count in (1, length) for count, length in zip(scale, shape, strict=True))
    if not alike or (1 not in scale and math.prod(scale) > 1):
        return None
    return scale, tuple(
        1 if count > 1 else max(1, length) for count, length in zip(scale, shape, strict=True)
    )


def _ceil(length: int, block: int) -> int:
    return -(-length // block)
