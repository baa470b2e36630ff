"""Quantised weights are read by their values, or skipped with a reason."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from affectlens.checkpoints import Checkpoint, eight_bit, four_bit
from affectlens.checkpoints.memory import MemoryStore
from affectlens.checkpoints.quantized import QuantizedStore, unpacked

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
STATE = "w.weight.quant_state.bitsandbytes__nf4"
COMPRESSED = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}
FBGEMM = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
NO_BLOCKS = {"quantization_config": {"weight_block_size": ["a"]}}
SMALL_BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 16]}}


def fp8(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return torch.randn(shape).mul(50).to(dtype)


def scale(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def opened(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> QuantizedStore:
    found = unpacked(MemoryStore(tensors, config=config))
    assert isinstance(found, QuantizedStore)
    return found


def nf4(
    shape: tuple[int, ...], /, *, block: int = 64, nested: bool = False, **state: object
) -> dict[str, Tensor]:
    """Return a weight as bitsandbytes stores it, of random contents."""
    size = math.prod(shape)
    blocks = -(-size // block)
    known: dict[str, object] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": shape}
    found = {
        "w.weight": torch.randint(256, (-(-size // 2), 1), dtype=torch.uint8),
        "w.weight.absmax": scale(blocks),
        "w.weight.quant_map": torch.linspace(-1, 1, 16),
    }
    if nested:
        known |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.25}
        found["w.weight.absmax"] = torch.randint(256, (blocks,), dtype=torch.uint8)
        found["w.weight.nested_absmax"] = scale(-(-blocks // 4))
        found["w.weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    packed = json.dumps(known | state).encode()
    return {**found, STATE: torch.frombuffer(bytearray(packed), dtype=torch.uint8)}


def mxfp4() -> dict[str, Tensor]:
    blocks = torch.randint(256, (3, 6, 2, 16), dtype=torch.uint8)
    return {"w_blocks": blocks, "w_scales": torch.randint(100, 150, (3, 6, 2), dtype=torch.uint8)}


def int8() -> dict[str, Tensor]:
    values = torch.randint(-127, 128, (6, 10), dtype=torch.int8)
    return {"w.weight": values, "w.SCB": scale(6), "w.weight_format": torch.tensor(0, dtype=torch.uint8)}


READABLE = {
    "fp8 in blocks": {"w.weight": fp8(300, 200), "w.weight_scale_inv": scale(3, 2)},
    "fp8 experts in blocks": {"w": fp8(3, 140, 130), "w_scale_inv": scale(3, 2, 2)},
    "fp8 by channel": {"w.weight": fp8(6, 10), "w.weight_scale": scale(6)},
    "mxfp4": mxfp4(),
    "int8": int8(),
    "nf4": nf4((5, 7), block=8),
    "nf4, quantised twice": nf4((9, 15), block=8, nested=True),
    "nf4 in bfloat16": {
        **(held := nf4((4, 16))),
        "w.weight": held["w.weight"].view(-1).view(torch.bfloat16)[:, None],
    },
}

# The shape of the weight, of its scale, and of the scale as it multiplies; the names of both.
LAYOUTS = {
    "a number": ((4, 6), (), (1, 1), "w.weight", "w.weight_scale", {}),
    "a number, called inverse": ((4, 6), (), (1, 1), "w.weight", "w.weight_scale_inv", {}),
    "one of one": ((4, 6), (1,), (1, 1), "w.weight", "w.weight_scale", {}),
    "a vector's": ((6,), (1,), (1,), "w.weight", "w.weight_scale", {}),
    "by channel": ((4, 6), (4,), (4, 1), "w.weight", "w.weight_scale", {}),
    "by channel, as a column": ((4, 6), (4, 1), (4, 1), "w.weight", "w.weight_scale", {}),
    "by expert": ((3, 4, 6), (3, 1, 1), (3, 1, 1), "w", "w_scale_inv", {}),
    "by expert and row": ((3, 4, 6), (3, 4, 1), (3, 4, 1), "w", "w_scale", {}),
    "by expert and column": ((3, 4, 6), (3, 1, 6), (3, 1, 6), "w", "w_scale", FBGEMM),
    "fbgemm's, turned": ((3, 4, 6), (3, 6, 1), (3, 1, 6), "w", "w_scale", FBGEMM),
    "fbgemm's, turned and square": ((3, 6, 6), (3, 6, 1), (3, 1, 6), "w", "w_scale", FBGEMM),
    "DeepSeek-V4's name": ((4, 6), (1, 1), (1, 1), "w.weight", "w.scale", {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, E8M0, torch.uint8])
@pytest.mark.parametrize("shape", [(300, 200), (128, 256), (100, 50), (2, 300, 200)])
def test_fp8_in_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Blocks of 128 × 128 are multiplied by their scales, as in transformers; the last may be partial."""
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    powers = torch.randint(110, 130, grid, dtype=torch.uint8)
    stored = {E8M0: powers.view(E8M0), torch.uint8: powers}.get(dtype, scale(*grid).to(dtype))
    values = stored if dtype != torch.uint8 else powers.view(E8M0)
    weight = fp8(*shape)

    found = opened({"w": weight, "w_scale_inv": stored})

    expected = _dequantize_fp8_weight(weight, values, [128, 128], torch.float32)
    assert torch.equal(expected, found.read("w"))
    assert (shape, "float8_e4m3fn") == found.headers["w"]


def test_blocks_are_as_long_as_the_config_says() -> None:
    """`weight_block_size` sets the block, also in the text config of a multimodal model."""
    weight, scales = fp8(10, 40, dtype=E5M2), scale(3, 3)
    tensors = {"w.weight": weight, "w.weight_scale_inv": scales}

    top, nested = opened(tensors, SMALL_BLOCKS), opened(tensors, {"text_config": SMALL_BLOCKS})

    expected = _dequantize_fp8_weight(weight, scales, [4, 16], torch.float32)
    assert torch.equal(expected, top.read("w.weight"))
    assert torch.equal(expected, nested.read("w.weight"))


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_of_scales(case: str) -> None:
    """Shape and format decide whether a scale is for the tensor, a channel or an expert."""
    shape, stored, multiplied, name, beside, config = LAYOUTS[case]
    weight, scales = fp8(*shape), scale(*stored)

    found = opened({name: weight, beside: scales}, config)

    assert torch.equal(weight.float() * scales.reshape(multiplied), found.read(name))
    assert {name: (name, beside)} == found.stored_as
    assert [name] == list(found.headers)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    """gpt-oss' blocks unpack to (experts, in, out), as in transformers."""
    tensors = mxfp4()

    found = opened(tensors)

    expected = convert_moe_packed_tensors(tensors["w_blocks"], tensors["w_scales"], dtype=torch.float32)
    assert torch.equal(expected, found.read("w"))
    assert ((3, 64, 6), "mxfp4") == found.headers["w"]


def test_int8_of_bitsandbytes() -> None:
    """127 stands for the largest magnitude of a row."""
    values = torch.tensor([[127, -127, 0], [127, 1, -64]], dtype=torch.int8)

    found = opened({"w.weight": values, "w.SCB": torch.tensor([2.0, 127.0])})

    assert torch.allclose(torch.tensor([[2.0, -2, 0], [127, 1, -64]]), found.read("w.weight"))


def test_int8_of_compressed_tensors() -> None:
    """Integers are multiplied by their scale if the config names their format."""
    values, scales = torch.randint(-127, 128, (4, 6), dtype=torch.int8), scale(4, 1)

    found = opened({"w.weight": values, "w.weight_scale": scales}, COMPRESSED)

    assert torch.equal(values * scales, found.read("w.weight"))


def test_nf4_by_hand() -> None:
    """The high half of a byte comes first, and each block has its own absmax."""
    tensors = nf4((2, 3), block=4)
    tensors["w.weight"] = torch.tensor([[0x0F], [0x7F], [0xF0]], dtype=torch.uint8)
    tensors["w.weight.absmax"] = torch.tensor([3.0, 10.0])
    tensors["w.weight.quant_map"] = torch.arange(16.0)

    found = opened(tensors)

    assert [[0, 45, 21], [45, 150, 0]] == found.read("w.weight").tolist()
    assert ((2, 3), "nf4") == found.headers["w.weight"]


def test_nf4_quantised_twice_by_hand() -> None:
    """A quantised absmax is an index into a map, times its own absmax, plus an offset."""
    tensors = nf4((1, 12), block=2, nested=True)
    tensors["w.weight"] = torch.full((6, 1), 0xFF, dtype=torch.uint8)
    tensors["w.weight.quant_map"] = torch.ones(16)
    tensors["w.weight.absmax"] = torch.arange(6, dtype=torch.uint8)
    tensors["w.weight.nested_quant_map"] = torch.arange(256.0)
    tensors["w.weight.nested_absmax"] = torch.tensor([1.0, 100.0])

    found = opened(tensors).read("w.weight")

    assert [0.25, 1.25, 2.25, 3.25, 400.25, 500.25] == found[0, ::2].tolist()


def test_nf4_comes_back_near_to_what_was_packed() -> None:
    """No value is off by more than half a step of the map times the absmax of its block."""
    weight, tensors = torch.randn(8, 48), nf4((8, 48), block=16)
    blocks = weight.view(-1, 16)
    absmax = blocks.abs().amax(1)
    near = (blocks / absmax[:, None]).sub(-1).div(2 / 15).round().to(torch.uint8).view(-1, 2)
    tensors |= {"w.weight": (near[:, :1] << 4) | near[:, 1:], "w.weight.absmax": absmax}

    off = (opened(tensors).read("w.weight") - weight).abs().view(-1, 16).amax(1)

    assert (off <= absmax / 15 + 1e-6).all()


@pytest.mark.parametrize("case", READABLE)
def test_rows_are_those_of_the_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading some rows, or small pieces, gives the same bits and leaves the stored tensor alone."""
    tensors = READABLE[case]
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = opened(tensors)
    (name,) = found.headers
    whole = found.read(name)
    monkeypatch.setattr(four_bit, "_PIECE", 32)
    monkeypatch.setattr(eight_bit, "_PIECE", 32)

    count = found.headers[name].shape[0]
    for first in range(count):
        for rows in (slice(first, first + 1), slice(first, None), slice(first, first)):
            assert torch.equal(whole[rows], found.read(name, rows))
    assert whole.shape == found.headers[name].shape
    assert torch.float32 == whole.dtype
    assert found.span(name) is None
    assert {name: tuple(tensors)} == {name: tuple(sorted(found.stored_as[name], key=list(tensors).index))}
    for part, tensor in tensors.items():
        assert torch.equal(before[part].view(torch.uint8), tensor.view(torch.uint8))


def without(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


NAN, BYTES = torch.tensor([1.0, math.nan]), torch.zeros(4, 6, dtype=torch.uint8)
W8, S8 = {"w.weight": fp8(4, 6)}, "w.weight_scale"
UNREADABLE: dict[str, tuple[dict[str, Tensor], Mapping[str, Any], str]] = {
    "a scale of another shape": ({**W8, S8: scale(3)}, {}, "doesn't fit"),
    "a scale an element": ({**W8, S8: scale(4, 6)}, {}, "doesn't fit"),
    "blocks of another length": ({**W8, "w.weight_scale_inv": scale(2, 1)}, {}, "doesn't fit"),
    "blocks that are none": ({**W8, S8: scale(2, 1)}, NO_BLOCKS, "fit"),
    "square experts of an unknown tool": ({"w": fp8(3, 6, 6), "w_scale": scale(3, 6, 1)}, {}, "doesn't fit"),
    "a scale that is no number": ({"w.weight": fp8(2, 6), S8: NAN}, {}, "not finite"),
    "a power that is no number": ({**W8, S8: torch.tensor([255], dtype=torch.uint8)}, {}, "not finite"),
    "a scale of whole numbers": ({**W8, S8: torch.ones(1, dtype=torch.int64)}, {}, "int64"),
    "two scales": ({**W8, S8: scale(1), "w.weight_scale_inv": scale(1)}, {}, "beside"),
    "a zero point": ({**W8, "w.weight_zero_point": scale(1)}, {}, "beside"),
    "no scale, though the config speaks of one": (W8, SMALL_BLOCKS, "without a scale"),
    "no scale, though others have one": ({**W8, "v.weight_scale": scale(1)}, {}, "without a scale"),
    "blocks without 16 bytes": ({**mxfp4(), "w_blocks": mxfp4()["w_blocks"][..., :8]}, {}, "don't fit"),
    "blocks also unpacked": ({**mxfp4(), "w": scale(2)}, {}, "also stored"),
    "int8 by columns": ({**int8(), "w.weight_format": torch.tensor(2, dtype=torch.uint8)}, {}, "row by row"),
    "int8 of other rows": ({**int8(), "w.SCB": scale(5)}, {}, "SCB"),
    "int8 of an unknown tool": ({"w.weight": BYTES.to(torch.int8), S8: scale(4, 1)}, {}, "unknown packing"),
    "bytes of an unknown tool": ({"w.weight": BYTES}, FBGEMM, "unknown packing"),
    "nf4 without a state": (without(nf4((4, 8)), STATE), {}, "quantisation state"),
    "nf4 with a broken state": ({**nf4((4, 8)), STATE: torch.zeros(9, dtype=torch.uint8)}, {}, "no shape"),
    "nf4 of another shape": (nf4((4, 8), shape=[4, 9]), {}, "doesn't fit"),
    "nf4 of a huge shape": (nf4((4, 8), shape=[2**61, 2**61]), {}, "doesn't fit"),
    "nf4 of a negative shape": (nf4((4, 8), shape=[-4, -8]), {}, "no shape"),
    "nf4 of other blocks": (nf4((4, 8), blocksize=8), {}, "absmax"),
    "nf4 that says fp4": (nf4((4, 8), quant_type="fp4"), {}, "not of type nf4"),
    "nf4 without its map": (without(nf4((4, 8)), "w.weight.quant_map"), {}, "missing"),
    "nf4 with no number": ({**nf4((4, 8), block=16), "w.weight.absmax": NAN}, {}, "not finite"),
    "nf4 with an endless offset": (nf4((4, 8), nested=True, nested_offset=math.inf), {}, "nested_offset"),
    "GPTQ": ({"w.qweight": BYTES, "w.qzeros": BYTES, "w.scales": BYTES, "w.g_idx": BYTES}, {}, "by GPTQ"),
    "AWQ": ({"w.qweight": BYTES, "w.qzeros": BYTES, "w.scales": BYTES}, {}, "by AWQ"),
    "compressed-tensors": ({"w.weight_packed": BYTES, "w.weight_shape": BYTES}, {}, "compressed-tensors"),
    "HQQ": ({"w.W_q": BYTES, "w.zero": BYTES}, {}, "by HQQ"),
    "torchao": ({"w._weight_qdata": BYTES, "w._weight_scale": BYTES}, {}, "by torchao"),
    "NVFP4": ({"w.weight": BYTES, S8: fp8(4, 1), "w.weight_scale_2": scale(1)}, {}, "by NVFP4"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_leaves_room_for_doubt_is_left_out(case: str) -> None:
    """A doubtful weight is skipped with the reason and a fix, and every stored element is counted."""
    tensors, config, reason = UNREADABLE[case]

    found = opened({**tensors, "w.bias": torch.zeros(3)}, config)

    others = {"w.bias", "w", "v.weight_scale"} if case != "square experts of an unknown tool" else {"w.bias"}
    assert found.headers.keys() <= others
    assert tensors.keys() | {"w.bias"} == found.headers.keys() | found.skipped.keys()
    assert all(reason in why and "unquantised" in why for why, _ in found.skipped.values()), found.skipped
    assert {n: tensors[n].numel() for n in found.skipped} == {
        n: size for n, (_, size) in found.skipped.items()
    }


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8, torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("beside", ["", "factors", "q_s"])
@pytest.mark.parametrize("name", ["w.weight", "mlp.experts.gate_up_proj", "w1"])
def test_a_weight_without_a_known_scale_is_left_out(dtype: torch.dtype, beside: str, name: str) -> None:
    """Small numbers alone don't say what they stand for; what lies beside them is named."""
    module = name.rpartition(".")[0]
    more = {f"{module}.{beside}": scale(4)} if beside and module else {}

    found = opened({name: fp8(4, 6).float().to(dtype), **more})

    assert name not in found.headers
    assert ("without a scale" if dtype in (E4M3, E5M2) else "unknown packing") in found.skipped[name][0]
    assert not more or beside in found.skipped[name][0]


@pytest.mark.parametrize("leaf", ["weight", "bias", "num_batches_tracked"])
def test_a_vector_of_integers_is_no_parameter(leaf: str) -> None:
    """A quantised bias or norm is left out as matrices are; counts are what they are."""
    found = unpacked(MemoryStore({f"w.{leaf}": torch.tensor([3, 90, -7], dtype=torch.int8)}))

    assert (leaf == "num_batches_tracked") == (f"w.{leaf}" in found.headers)


def test_a_plain_cast_of_other_tensors_is_read_as_it_is() -> None:
    """fp8 numbers that are no weight, without any sign of a scale, are their own values."""
    table = fp8(4, 6, dtype=E5M2)

    assert torch.equal(table.float(), opened({"w.table": table}).read("w.table"))


def test_ordinary_stores_are_returned() -> None:
    """Integer buffers, and parameters named scale, don't make a checkpoint quantised."""
    store = MemoryStore({
        "w.weight": scale(4, 6), "layer.scale": scale(4), "attn.k_scale": scale(1), "w.input_scale": scale(1),
        "position_ids": torch.zeros(1, 6, dtype=torch.uint8), "mask": torch.zeros(4, 4, dtype=torch.int8),
    })  # fmt: skip

    assert unpacked(store) is store


def test_all_else_passes_through() -> None:
    """Other tensors keep headers, bytes and values; activation scales are skipped."""
    tensors = {
        **W8, S8: scale(1), "w.input_scale": scale(1), "attn.k_scale": scale(1), "norm.qk_scale": scale(1),
        "mask": torch.zeros(4, 4, dtype=torch.int8), "norm.weight": scale(6),
    }  # fmt: skip
    store = MemoryStore(tensors, name="n", config={"a": 1})

    found = unpacked(store)

    assert isinstance(found, QuantizedStore)
    for name in ("norm.qk_scale", "mask", "norm.weight"):
        assert store.headers[name] == found.headers[name]
        span, inner = found.span(name), store.span(name)
        assert (span.key if span else None) == (inner.key if inner else "missing")
        assert tensors[name].data_ptr() == found.read(name).data_ptr()
    assert dict.fromkeys(("w.input_scale", "attn.k_scale"), ("activation scale", 1)) == found.skipped
    assert (store.name, store.source, store.format, store.config, store.facts) == (
        found.name, found.source, found.format, found.config, found.facts
    )  # fmt: skip


def test_sites_are_those_of_the_unquantised_checkpoint() -> None:
    """The experts of gpt-oss have the same sites and values as if stored unpacked."""
    packed = mxfp4()
    prefix, config = "model.layers.0.mlp.experts", {"model_type": "gpt_oss"}
    biases = {f"{prefix}.gate_up_proj_bias": scale(3, 6)}
    found = opened({**{f"{prefix}.gate_up_proj{k[1:]}": v for k, v in packed.items()}, **biases}, config)
    plain = MemoryStore({f"{prefix}.gate_up_proj": opened(packed).read("w"), **biases}, config=config)

    one, two = Checkpoint(plain), Checkpoint(found)

    assert one.sites == two.sites
    for site in one.sites:
        assert torch.equal(one.read(site), two.read(site))


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    """Opening checks shapes and scales in the file's bytes, without torch."""
    path = tmp_path / "model.safetensors"
    save_file({**nf4((4, 8), nested=True), "v.weight": fp8(4, 6), "v.weight_scale": scale(4)}, path)
    program = (
        "import sys; from pathlib import Path; from affectlens.checkpoints.quantized import unpacked\n"
        "from affectlens.checkpoints.bytes import LocalFile\n"
        "from affectlens.checkpoints.safetensors import SafetensorsStore\n"
        f"store = unpacked(SafetensorsStore('here', [LocalFile(Path({str(path)!r}))], config={{}}))\n"
        "print(sorted(store.headers), 'torch' in sys.modules)"
    )

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "['v.weight', 'w.weight'] False\n" == run.stdout
