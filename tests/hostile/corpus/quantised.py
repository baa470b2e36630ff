"""Quantised weights whose scales are missing, broken or of another shape: skipped with the reason."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.hostile.case import Case
from tests.hostile.corpus.pairs import Tensors, save, tensors
from tests.hostile.writing import GATE

_MODULE = GATE.removesuffix(".weight")
_FP8 = torch.ones(16, 8).to(torch.float8_e4m3fn)
_BYTES = torch.arange(64, dtype=torch.uint8).reshape(64, 1)
_MAP = torch.linspace(-1, 1, 16)
_EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def _state(**change: object) -> Tensor:
    """Return what bitsandbytes writes about a weight of 16 × 8."""
    known: dict[str, object] = {"quant_type": "nf4", "blocksize": 64, "shape": [16, 8], "dtype": "float32"}
    return torch.tensor(list(json.dumps({**known, **change}).encode()), dtype=torch.uint8)


def _nf4(state: Tensor, **parts: Tensor) -> Tensors:
    """Return a weight of bitsandbytes with its state, and changes to the tensors beside it."""
    beside = {"absmax": torch.ones(2), "quant_map": _MAP, **parts}
    found = {f"{GATE}.{name}": value for name, value in beside.items()}
    return {GATE: _BYTES, f"{GATE}.quant_state.bitsandbytes__nf4": state, **found}


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensors:
    return {f"{_EXPERTS}_blocks": blocks, f"{_EXPERTS}_scales": scales}


def _fp8(**beside: Tensor) -> Tensors:
    return {GATE: _FP8, **{f"{GATE}{name}": value for name, value in beside.items()}}


def _int8(**beside: Tensor) -> Tensors:
    weight = torch.ones(16, 8, dtype=torch.int8)
    return {GATE: weight, **{f"{_MODULE}.{name}": value for name, value in beside.items()}}


def _words(*names: str) -> Tensors:
    return {f"{_MODULE}.{name}": torch.zeros(8, 2, dtype=torch.int32) for name in names}


def _bytes(value: int, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


_NAN, _INF = torch.tensor(np.nan), torch.tensor(np.inf)
_BLOCKS, _SCALES = _bytes(0, 2, 32, 1, 16), _bytes(127, 2, 32, 1)
_SHAPELESS, _UNNESTED = "state has no shape and blocksize", "state has no nested_blocksize and nested_offset"
# name, what takes the place of the gate, why it is skipped
_SKIPPED: tuple[tuple[str, Tensors, str], ...] = (
    ("fp8 without a scale", _fp8(), "float8_e4m3fn without a scale"),
    ("fp8 with a NaN scale", _fp8(_scale=_NAN), "weight_scale is not finite"),
    ("fp8 with an endless scale", _fp8(_scale_inv=_INF.reshape(1, 1)), "weight_scale_inv is not finite"),
    ("fp8 with five scales", _fp8(_scale=torch.ones(5)), "weight_scale (5,) doesn't fit it"),
    ("fp8 with no scales", _fp8(_scale=torch.ones(0)), "weight_scale (0,) doesn't fit it"),
    ("fp8 with a cube of scales", _fp8(_scale=torch.ones(2, 2, 2)), "weight_scale (2, 2, 2) doesn't fit it"),
    ("fp8 with a whole number", _fp8(_scale=torch.tensor(1)), "weight_scale of int64"),
    ("fp8 with two scales", _fp8(_scale=torch.ones(1), _scale_inv=torch.ones(1)), "beside weight_scale_inv"),
    ("fp8 with a zero point", _fp8(_zero_point=torch.ones(1)), "beside weight_zero_point"),
    ("int8 without a scale", _int8(), "int8 numbers in an unknown packing"),
    ("int8 with two rows of scales", _int8(SCB=torch.ones(2)), "SCB (2,) of float32 doesn't fit it"),
    ("int8 with a NaN scale", _int8(SCB=_NAN.repeat(16)), "SCB is not finite"),
    ("int8 in another order", _int8(SCB=torch.ones(16), weight_format=_bytes(2, 1)), "not stored row by row"),
    ("GPTQ", _words("qweight", "qzeros", "scales", "g_idx"), "packed by GPTQ"),
    ("AWQ", _words("qweight", "qzeros", "scales"), "packed by AWQ or GPTQ"),
    ("compressed-tensors", _words("weight_packed", "weight_scale"), "packed by compressed-tensors"),
    ("HQQ", _words("W_q", "scale", "zero"), "packed by HQQ"),
    ("AQLM", _words("codes", "codebooks", "scales"), "packed by AQLM"),
    ("NVFP4", _words("weight", "weight_scale", "weight_scale_2"), "packed by NVFP4"),
    ("nf4 without a state", {GATE: _BYTES, f"{GATE}.absmax": torch.ones(2)}, "it has 0 quantisation states"),
    ("nf4 with a state that is no JSON", _nf4(_bytes(0, 9)), _SHAPELESS),
    ("nf4 with a state of brackets", _nf4(_bytes(91, 60_000)), _SHAPELESS),
    ("nf4 with a state of a megabyte", _nf4(_bytes(32, 1_000_000)), _SHAPELESS),
    ("nf4 of another shape", _nf4(_state(shape=[16, 9])), "shape (16, 9) doesn't fit"),
    ("nf4 of a negative shape", _nf4(_state(shape=[-16, -8])), _SHAPELESS),
    ("nf4 of an endless shape", _nf4(_state(shape=[2**61] * 8)), "doesn't fit"),
    ("nf4 of blocks of nothing", _nf4(_state(blocksize=0)), _SHAPELESS),
    ("nf4 that is fp4", _nf4(_state(quant_type="fp4")), "state is not of type"),
    ("nf4 with a NaN", _nf4(_state(), absmax=_NAN.repeat(2)), "its absmax is not finite"),
    ("nf4 with a short absmax", _nf4(_state(), absmax=torch.ones(1)), "absmax is (1,) of float32, not (2,)"),
    ("nf4 with a long map", _nf4(_state(), quant_map=torch.ones(256)), "quant_map is (256,) of float32"),
    ("nf4 nested without a state", _nf4(_state(), nested_absmax=torch.ones(1)), _UNNESTED),
    ("nf4 nested with NaN", _nf4(_state(nested_offset=np.nan), nested_absmax=torch.ones(1)), _UNNESTED),
    ("MXFP4 with other scales", _mxfp4(_BLOCKS, _bytes(127, 2, 31, 1)), "don't fit blocks"),
    ("MXFP4 of other blocks", _mxfp4(_bytes(0, 2, 32, 1, 8), _SCALES), "don't fit blocks"),
    ("MXFP4 with a NaN scale", _mxfp4(_BLOCKS, _bytes(255, 2, 32, 1)), "a scale is NaN"),
    ("MXFP4 unpacked too", {**_mxfp4(_BLOCKS, _SCALES), _EXPERTS: torch.ones(2, 32, 32)}, "stored unpacked"),
)


def _put(root: Path, *, parts: Tensors, verb: str) -> list[str]:
    found = tensors(seed=1)
    del found[GATE]
    tuned = save(root / "tuned", {**found, **parts}, quantization_config={"quant_method": "odd"})
    return [verb, *([str(save(root / "base", tensors()))] if verb == "diff" else []), str(tuned)]


def _all(root: Path) -> list[str]:
    """Pack every weight of a checkpoint without its scale."""
    packed = {name: value.to(torch.float8_e4m3fn) for name, value in tensors().items()}
    tuned = save(root / "tuned", packed, quantization_config={"quant_method": "fp8"})
    return ["diff", str(save(root / "base", tensors())), str(tuned)]


CASES: tuple[Case, ...] = (
    *(
        Case(f"quantised: {name} ({verb})", "quantised", partial(_put, parts=parts, verb=verb), "told", says)
        for name, parts, why in _SKIPPED
        for verb, says in (("inspect", ("skipped", why)), ("diff", ("skipped", "were skipped", why)))
    ),
    Case("quantised: all of it", "quantised", partial(_all), "refused", ("float8_e4m3fn without a scale",)),
)
