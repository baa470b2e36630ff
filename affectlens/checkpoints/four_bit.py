"""4-bit weights, found by the tensors beside them, checked, and unpacked to float32.

    quantized ── tensor ──▶ mxfp4 | four_bit ──▶ Found(name, parts, Packed or the reason why not)

Two numbers share a byte, and a block of numbers shares a scale. Two fully specified formats are supported:
MXFP4 (the OCP microscaling specification, in the layout of gpt-oss), and NF4 and FP4 of bitsandbytes
(Dettmers et al. 2023, QLoRA, section 3), with or without double quantisation.
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.store import Store

if TYPE_CHECKING:
    from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_PIECE = 2**20  # numbers unpacked at a time, which bounds the memory beyond that of the result
_JSON_LIMIT = 2**16  # bytes; a quantisation state has about 200
_LOOK = 2**20  # bytes; opening does not check larger scales
# Bytes of the dtypes that 4-bit data are stored as.
_WIDTHS = {"uint8": 1, "int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
# The exponent bits, all set in infinity and NaN.
_EXPONENTS = {
    "float32": ("<u4", 0x7F800000),
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "float8_e8m0fnu": ("u1", 0xFF),
    "uint8": ("u1", 0xFF),  # e8m0 by another name
}


class Packed(Protocol):
    """A weight in a known packed form."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape when unpacked."""
        ...

    @property
    def dtype(self) -> str:
        """The name of the packed form, for people."""
        ...

    def read(self, store: Store, *, first: int, last: int) -> "Tensor":
        """Unpack rows into new float32 memory."""
        ...


class Found(NamedTuple):
    """A quantised weight, its stored tensors, and how to unpack it, or the reason why it can't be."""

    name: str
    parts: tuple[str, ...]
    packed: Packed | str


def mxfp4(store: Store, tensor: str) -> Found | None:
    """Find the MXFP4 weight whose `_blocks` a tensor is; None if it is not one."""
    blocks = store.headers[tensor]
    name = tensor.removesuffix("_blocks")
    scales = f"{name}_scales"
    if name == tensor or blocks.dtype != "uint8" or len(blocks.shape) != 4 or scales not in store.headers:
        return None
    experts, out, groups, size = blocks.shape
    stored = store.headers[scales]
    packed: Packed | str = _Mxfp4(tensor, scales, (experts, groups * 32, out))
    if name in store.headers:
        packed = f"MXFP4, but {name!r} is also stored unpacked"
    elif size != 16 or stored.dtype != "uint8" or stored.shape != blocks.shape[:3]:
        packed = f"MXFP4, but scales {stored.shape} of {stored.dtype} don't fit blocks {blocks.shape}"
    elif not finite(store, scales):
        packed = "MXFP4, but a scale is NaN"
    return Found(name, (tensor, scales), packed)


def four_bit(store: Store, tensor: str) -> Found | None:
    """Find the bitsandbytes weight that a tensor packs; None if it is not one."""
    states = [f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    beside = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", *states]
    parts = tuple(part for leaf in beside if (part := f"{tensor}.{leaf}") in store.headers)
    state = [part for part in parts if ".quant_state." in part]
    if not state and f"{tensor}.absmax" not in store.headers:
        return None
    packed: Packed | str = f"it has {len(state)} quantisation states instead of one"
    if len(state) == 1:
        kind = state[0][-3:]
        packed = _four_bit(store, tensor, kind=kind, state=_state(store, state[0]))
    prefix = "bitsandbytes 4-bit, but "
    return Found(tensor, (tensor, *parts), prefix + packed if isinstance(packed, str) else packed)


def raw(store: Store, tensor: str) -> bytes:
    """Return the bytes of a small tensor; from a file they are read without torch."""
    span = store.span(tensor)
    if span is not None:
        return bytes(span.read())
    import torch

    values = store.read(tensor).cpu().contiguous().reshape(-1).view(torch.uint8)
    return values.numpy().tobytes()


def finite(store: Store, tensor: str) -> bool:
    """Return whether all scales are finite; large or remote ones are not fetched and count as finite.

    If such a scale is not finite after all, its values are not finite, and a diff counts and reports them.
    """
    shape, dtype = store.headers[tensor]
    span = store.span(tensor)
    near = span is None or store.format == "memory" or isinstance(span.of, LocalFile)
    if (
        dtype not in _EXPONENTS
        or not near
        or math.prod(shape) * np.dtype(_EXPONENTS[dtype][0]).itemsize > _LOOK
    ):
        return True
    kind, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(raw(store, tensor), kind)
    return not bool(((bits & exponent) == exponent).any())


def powers(stored: "Tensor") -> "Tensor":
    """Return the scales of e8m0 bytes, 2^(byte − 127), in float32; 255 is NaN."""
    import torch

    return stored.contiguous().view(torch.float8_e8m0fnu).float()


def multiply(values: "Tensor", scales: "Tensor", *, width: int) -> None:
    """Multiply values by scales for `width` columns each, in place.

    A view avoids spreading the scales over the columns, which would need the memory of the weight again.
    """
    full, rest = divmod(values.shape[-1], width)
    if full:
        values[..., : full * width].view(*values.shape[:-1], full, width).mul_(scales[..., :full, None])
    if rest:
        values[..., full * width :].mul_(scales[..., full:])


@dataclass(frozen=True)
class _Mxfp4:
    """Experts of gpt-oss: groups of 32 numbers share a power of two; stored (out, in)."""

    blocks: str
    scales: str
    shape: tuple[int, ...]  # (experts, in, out), as in the model
    dtype: str = "mxfp4"

    def read(self, store: Store, *, first: int, last: int) -> "Tensor":
        import torch

        pairs = _pairs(torch.tensor(_E2M1, dtype=torch.float32), low_first=True)
        _, into, out = self.shape
        unpacked = torch.empty(last - first, out, into, dtype=torch.float32)
        for expert in range(first, last):
            # One expert at a time, so that the packed bytes of all are never in memory with the result.
            one = slice(expert, expert + 1)
            groups = store.read(self.blocks, one).cpu().reshape(-1, 16)
            scales = powers(store.read(self.scales, one).cpu().reshape(-1, 1))
            target = unpacked[expert - first].view(-1, 32)
            for start in range(0, len(groups), _PIECE // 32):
                some = slice(start, start + _PIECE // 32)
                torch.mul(pairs[groups[some].int()].flatten(1), scales[some], out=target[some])
        return unpacked.mT


@dataclass(frozen=True)
class _FourBit:
    """A bitsandbytes weight: 4-bit indices into a map of 16 values, and one absmax for each block."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    width: int  # bytes of an element of the stored tensor
    block: int
    nested: tuple[int, float] | None  # block size and offset if the absmax are quantised too

    def read(self, store: Store, *, first: int, last: int) -> "Tensor":
        import torch

        pairs = _pairs(store.read(f"{self.tensor}.quant_map").cpu(), low_first=False)
        row = math.prod(self.shape[1:])
        start, stop = first * row, last * row
        unpacked = torch.empty(stop - start, dtype=torch.float32)
        for begin in range(start, stop, _PIECE):
            end = min(begin + _PIECE, stop)
            values = self._indexed(store, pairs, begin=begin, end=end)
            scales = self._scales(store, begin // self.block, -(-end // self.block))
            where = torch.arange(begin, end) // self.block - begin // self.block
            torch.mul(values, scales[where], out=unpacked[begin - start : end - start])
        return unpacked.reshape(last - first, *self.shape[1:])

    def _indexed(self, store: Store, pairs: "Tensor", *, begin: int, end: int) -> "Tensor":
        import torch

        each = 2 * self.width
        held = store.read(self.tensor, slice(begin // each, -(-end // each))).cpu()
        values = pairs[held.contiguous().reshape(-1).view(torch.uint8).int()].flatten()
        skip = begin % each  # a row may begin in the middle of a byte
        return values[skip : skip + end - begin]

    def _scales(self, store: Store, begin: int, end: int) -> "Tensor":
        import torch

        held = store.read(f"{self.tensor}.absmax", slice(begin, end)).cpu()
        if self.nested is None:
            return held
        block, offset = self.nested
        outer = store.read(f"{self.tensor}.nested_absmax", slice(begin // block, -(-end // block))).cpu()
        levels = store.read(f"{self.tensor}.nested_quant_map").cpu()[held.int()]
        return levels * outer[torch.arange(begin, end) // block - begin // block] + offset


def _state(store: Store, tensor: str) -> dict[str, Any]:
    shape, dtype = store.headers[tensor]
    if dtype != "uint8" or math.prod(shape) > _JSON_LIMIT:
        return {}
    try:
        found = json.loads(raw(store, tensor))
    except (ValueError, RecursionError):  # bytes that are not UTF-8 raise ValueError
        return {}
    return found if isinstance(found, dict) else {}


def _four_bit(store: Store, tensor: str, *, kind: str, state: dict[str, Any]) -> Packed | str:
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or not all(map(_counts, [*shape, block])):
        return "its quantisation state has no shape and blocksize"
    assert isinstance(block, int)
    if state.get("quant_type") != kind:
        return f"its quantisation state is not of type {kind}"
    size, held = math.prod(shape), store.headers[tensor]
    width = _WIDTHS.get(held.dtype, 0)
    if held.shape[:1] != (math.prod(held.shape),) or math.prod(held.shape) * width != -(-size // 2):
        return f"its shape {tuple(shape)} doesn't fit {held.shape} of {held.dtype}"
    blocks, nested = -(-size // block), None
    wanted = {"quant_map": ((16,), "float32"), "absmax": ((blocks,), "float32")}
    if f"{tensor}.nested_absmax" in store.headers:
        inner, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if not _counts(inner) or not isinstance(offset, float) or not math.isfinite(offset):
            return "its quantisation state has no nested_blocksize and nested_offset"
        assert isinstance(inner, int)
        nested = (inner, offset)
        wanted["absmax"] = ((blocks,), "uint8")
        wanted["nested_absmax"] = ((-(-blocks // inner),), "float32")
        wanted["nested_quant_map"] = ((256,), "float32")
    for leaf, header in wanted.items():
        if (flaw := _flaw(store, f"{tensor}.{leaf}", header)) is not None:
            return flaw
    return _FourBit(tensor, tuple(shape), kind, width, block, nested)


def _flaw(store: Store, tensor: str, wanted: tuple[tuple[int, ...], str]) -> str | None:
    leaf = tensor.rpartition(".")[2]
    header = store.headers.get(tensor)
    if header is None or tuple(header) != wanted:
        there = f"{header.shape} of {header.dtype}" if header else "missing"
        return f"its {leaf} is {there}, not {wanted[0]} of {wanted[1]}"
    if wanted[1] != "uint8" and not finite(store, tensor):
        return f"its {leaf} is not finite"
    return None


def _counts(value: object) -> bool:
    return type(value) is int and 0 < value < 2**62


def _pairs(levels: "Tensor", *, low_first: bool) -> "Tensor":
    """Return the two numbers of every possible byte, (256, 2)."""
    import torch

    byte = torch.arange(256)
    halves = (byte & 15, byte >> 4) if low_first else (byte >> 4, byte & 15)
    return torch.stack([levels[half] for half in halves], dim=1)
