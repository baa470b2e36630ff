"""Safetensors files whose header or data is broken, or has two readings."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from tests.hostile.case import Case
from tests.hostile.writing import GATE, entry, model, packed, values, write

_ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_FOUR = bytes(4)

# name, header, data, what must be said beside the name of the file
_REFUSED: tuple[tuple[str, object, bytes, tuple[str, ...]], ...] = (
    ("tensor twice", f'{{"a":{_ONE},"a":{_ONE}}}', _FOUR, ("tensor 'a'", "named twice")),
    ("tensor twice, once escaped", f'{{"a":{_ONE},"\\u0061":{_ONE}}}', _FOUR, ("tensor 'a'", "named twice")),
    ("two dtypes", '{"a":{"dtype":"I32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', _FOUR,
     ("tensor 'a'", "'dtype' twice")),
    ("two shapes", '{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}}', _FOUR,
     ("tensor 'a'", "'shape' twice")),
    ("metadata twice", f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{_ONE}}}', _FOUR, ("'k' twice",)),
    ("metadata of numbers", f'{{"__metadata__":{{"k":1}},"a":{_ONE}}}', _FOUR, ("map strings to strings",)),
    ("metadata of lists", f'{{"__metadata__":[1],"a":{_ONE}}}', _FOUR, ("map strings to strings",)),
    ("list", "[]", b"", ("not a JSON object",)),
    ("string", '"a"', b"", ("not a JSON object",)),
    ("no length", "", b"", ("not a JSON object",)),
    ("open brace", "{", b"", ("not valid JSON",)),
    ("cut short", f'{{"a":{_ONE}', _FOUR, ("not valid JSON",)),
    ("trailing comma", f'{{"a":{_ONE},}}', _FOUR, ("not valid JSON",)),
    ("text behind", f'{{"a":{_ONE}}} {{}}', _FOUR, ("not valid JSON",)),
    ("no UTF-8", b'{"\xff\xfe":' + _ONE.encode() + b"}", _FOUR, ("not UTF-8",)),
    ("UTF-16", f'{{"a":{_ONE}}}'.encode("utf-16-le"), _FOUR, ("not valid JSON",)),
    ("byte order mark", f'\ufeff{{"a":{_ONE}}}', _FOUR, ("not a JSON object",)),
    ("leading space", f' {{"a":{_ONE}}}', _FOUR, ("not a JSON object",)),
    ("half a surrogate pair", f'{{"x\\ud800y":{_ONE}}}', _FOUR, ("not valid Unicode", "x�y")),
    ("ten thousand brackets", '{"a":' + "[" * 10_000 + "]" * 10_000 + "}", b"", ("not valid JSON",)),
    ("brackets that never close", '{"a":' + "[" * 1_000_000, b"", ("not valid JSON",)),
    ("number of 5,000 digits", f'{{"a":{{"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,4]}}}}',
     _FOUR,
     ("not valid JSON",)),
    ("entry is null", '{"a":null}', b"", ("tensor 'a'", "lacks dtype")),
    ("entry is a list", '{"a":[]}', b"", ("tensor 'a'", "lacks dtype")),
    ("entry is text", '{"a":"dtype"}', b"", ("tensor 'a'", "lacks dtype")),
    ("no dtype", '{"a":{"shape":[1],"data_offsets":[0,4]}}', _FOUR, ("tensor 'a'", "lacks dtype")),
    ("no offsets", '{"a":{"dtype":"F32","shape":[1]}}', _FOUR, ("tensor 'a'", "lacks dtype")),
    ("three offsets", '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,2,4]}}', _FOUR,
     ("tensor 'a'", "lacks")),
    ("unknown dtype", {"a": entry([1], 0, 4, "F31")}, _FOUR, ("tensor 'a'", "unknown dtype 'F31'")),
    ("dtype is a list", {"a": entry([1], 0, 4, ["F32"])}, _FOUR, ("tensor 'a'", "unknown dtype")),
    ("dtype of 100 kB", {"a": entry([1], 0, 4, "F" * 100_000)}, _FOUR, ("tensor 'a'", "unknown dtype 'FFF")),
    ("dtype that colours", {"a": entry([1], 0, 4, "\x1b[31mF32")}, _FOUR, ("unknown dtype", "[31mF32")),
    ("negative dimension", {"a": entry([-1], 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("fractional dimension", {"a": entry([1.0], 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("dimension is true", {"a": entry([True], 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("dimension is text", {"a": entry(["1"], 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("shape is a number", {"a": entry(1, 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("shape is an object", {"a": entry({"0": 1}, 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("nested shape", {"a": entry([[1]], 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("dimension of 2^63", {"a": entry([2**63], 0, 4)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("product of 2^64", {"a": entry([2**32, 2**32], 0, 0)}, b"", ("tensor 'a'", "elements than a tensor")),
    ("overflow times zero", {"a": entry([2**40, 2**40, 0], 0, 0)}, b"",
     ("tensor 'a'", "elements than a tensor")),
    ("65 dimensions", {"a": entry([1] * 65, 0, 4)}, _FOUR, ("tensor 'a'", "more dimensions")),
    ("a million dimensions", {"a": entry([3] * 1_000_000, 0, 4)}, _FOUR, ("tensor 'a'", "more dimensions")),
    ("too few bytes", {"a": entry([2], 0, 4)}, _FOUR, ("tensor 'a'", "4 bytes for shape (2,)")),
    ("offsets reversed", {"a": entry([1], 4, 0)}, _FOUR, ("tensor 'a'", "-4 bytes for shape")),
    ("negative offset", {"a": entry([1], -4, 0)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("offset of 2^64", {"a": entry([1], 2**64 - 4, 2**64)}, _FOUR, ("tensor 'a'", "whole numbers")),
    ("beyond the end", {"a": entry([1], 0, 4), "b": entry([2**20], 4, 4 + 2**22)}, _FOUR,
     ("the tensors need 4,194,308 bytes", "the file holds 4")),
    ("overlap", {"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8), ("tensor 'b'", "overlaps")),
    ("same bytes twice", {"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, _FOUR, ("overlaps",)),
    ("hole", {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), ("tensor 'b'", "hole")),
    ("hole at the start", {"a": entry([1], 4, 8)}, bytes(8), ("tensor 'a'", "hole")),
    ("bytes behind", {"a": entry([1], 0, 4)}, bytes(96), ("need 4 bytes", "the file holds 96")),
    ("no tensors", {}, b"", ("holds no tensor",)),
    ("metadata alone", {"__metadata__": {"format": "pt"}}, b"", ("holds no tensor",)),
    ("packed floats alone", {"a": entry([4], 0, 2, "F4")}, bytes(2), ("no tensor that can be read",)),
    ("half a byte", {"a": entry([3], 0, 2, "F4")}, bytes(2), ("tensor 'a'", "2 bytes for shape")),
    ("name of 100 kB that is wrong", {"n" * 100_000: entry([2], 0, 4)}, _FOUR,
     ("tensor 'nnn", "nnn': 4 bytes")),
    ("name of a control that is wrong", {"a\x1b]0;x\x07b\nc": entry([2], 0, 4)}, _FOUR,
     ("tensor 'a�", "4 bytes")),
)  # fmt: skip

# name, first bytes of the file, what must be said
_RAW: tuple[tuple[str, bytes, tuple[str, ...]], ...] = (
    ("empty file", b"", ("is empty",)),
    ("seven bytes", bytes(7), ("only 7 bytes long",)),
    ("a length alone", bytes(8), ("not a JSON object",)),
    ("length beyond the file", (10**6).to_bytes(8, "little") + b"{}", ("claims 1,000,000 bytes", "has 10")),
    ("length of 2^63", (2**63).to_bytes(8, "little") + b"{}", ("the header claims",)),
    ("all zeros", bytes(4096), ("not a JSON object",)),
    ("all ones", b"\xff" * 4096, ("the header claims",)),
)


def _headed(root: Path, *, header: object, data: bytes) -> list[str]:
    return ["inspect", str(write(root / "input" / "model.safetensors", header, data).parent)]


def _raw(root: Path, *, content: bytes) -> list[str]:
    (root / "input").mkdir()
    (root / "input" / "model.safetensors").write_bytes(content)
    return ["inspect", str(root / "input" / "model.safetensors")]


def _many(root: Path, *, numbers: Iterable[int], value: str = "0") -> list[str]:
    """Write a header of many tensors, each with this entry."""
    entries = ",".join(f'"{number}":{value}' for number in numbers)
    return _headed(root, header=f"{{{entries}}}", data=b"")


def _long(root: Path) -> list[str]:
    """Write a header longer than the format allows, in a sparse file."""
    file = write(root / "input" / "model.safetensors", "{")
    with file.open("r+b") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(2**28)
    return ["inspect", str(file)]


def _packed_floats(root: Path, *, verb: str) -> list[str]:
    for side in ("base", "tuned"):
        header, data = packed(values(seed=int(side == "tuned")))
        header["model.layers.0.mlp.scales.weight"] = entry([2, 3], len(data), len(data) + 3, "F4")
        write(root / side / "model.safetensors", header, data + bytes(3))
    return [verb, *(str(root / side) for side in ("base", "tuned")[: 1 + (verb == "diff")])]


def _cut(root: Path) -> list[str]:
    model(root / "base")
    file = model(root / "tuned", seed=1) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return ["diff", str(root / "base"), str(root / "tuned")]


def _not_finite(root: Path) -> list[str]:
    tuned = values(seed=1)
    tuned[GATE].flat[:3] = np.nan, np.inf, -np.inf
    return ["diff", str(model(root / "base")), str(model(root / "tuned", tuned))]


def _large_sizes(root: Path) -> list[str]:
    """Write shapes without elements whose dimensions are large."""
    header, data = packed(values())
    end = len(data)
    header["model.layers.0.mlp.experts.mlp.w1"] = entry([2**40, 0, 0], end, end)
    header["model.layers.0.mlp.experts.gate_up_proj"] = entry([0, 2**40, 8], end, end)
    header["model.layers.1.self_attn.qkv.weight"] = entry([2**50, 0], end, end)
    folder = write(root / "input" / "model.safetensors", header, data).parent
    return ["diff", str(folder), str(folder)]


def _length_of_a_pickle(root: Path) -> list[str]:
    """Write a header of 640 bytes: its length begins with the mark of a pickle."""
    header, data = packed({GATE: values()[GATE]})
    text = json.dumps(header).ljust(640)
    return ["inspect", str(write(root / "input" / "model.safetensors", text, data))]


_FILE = "model.safetensors"
CASES: tuple[Case, ...] = (
    *(
        Case(
            f"header: {name}",
            "headers",
            partial(_headed, header=header, data=data),
            "refused",
            (_FILE, *says),
        )
        for name, header, data, says in _REFUSED
    ),
    *(
        Case(f"file: {name}", "headers", partial(_raw, content=content), "refused", (_FILE, *says))
        for name, content, says in _RAW
    ),
    Case(
        "header: a name twice among many",
        "headers",
        partial(_many, numbers=(*range(300_000), 5)),
        "refused",
        (_FILE, "tensor '5'", "named twice"),
    ),
    Case(
        "header: 220,000 tensors",
        "headers",
        partial(_many, numbers=range(220_000)),
        "refused",
        (_FILE, "more than 200,000 tensors"),
    ),
    Case(
        "header: half a million tensors",
        "headers",
        partial(_many, numbers=range(520_000), value='{"dtype":"U8","shape":[],"data_offsets":[0,0]}'),
        "refused",
        (_FILE, "more than 2,000,000 values"),
    ),
    Case("header: 100 MB and one", "headers", _long, "refused", (_FILE, "the format allows 100,000,000")),
    Case(
        "header: packed floats",
        "data",
        partial(_packed_floats, verb="inspect"),
        "told",
        ("F4", "not supported"),
    ),
    Case(
        "header: packed floats in a diff",
        "data",
        partial(_packed_floats, verb="diff"),
        "told",
        ("skipped", "F4"),
    ),
    Case("data: cut short", "data", _cut, "refused", (f"tuned/{_FILE}", "the tensors need")),
    Case("data: not finite", "data", _not_finite, "told", ("3 values are NaN or infinite",)),
    Case("data: large and empty", "data", _large_sizes, "told", ("did not move",)),
    Case("header: as long as a pickle's mark", "data", _length_of_a_pickle, "told", ("128 in 1 tensors",)),
)
