"""Torch files whose archive, storages, tensors or envelopes are not what they say."""

import json
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.pickling import (
    before,
    call,
    mapping,
    named,
    number,
    numbers,
    program,
    tensor,
    text,
    zipped,
)
from tests.hostile.writing import GATE
from tests.hostile.writing import model as base

_FILE = "pytorch_model.bin"
_WIDE = 1 << 40


def _written(
    root: Path, *, value: bytes, write: Callable[..., Path] = zipped, verb: str = "inspect", **how: object
) -> list[str]:
    """Write a torch file in which `value` was saved."""
    return [verb, str(write(root / "input" / _FILE, program(value), **how))]


def _against(root: Path, *, value: bytes) -> list[str]:
    """Use a torch file as the tuned side of a diff."""
    file = zipped(root / "input" / _FILE, program(value))
    return ["diff", str(base(root / "base")), str(file)]


def _sharded(root: Path, *, named: str | None) -> list[str]:
    """Write two shards that both hold the gate; the index says which to read, or names it nowhere."""
    folder, weights = root / "input", {GATE: named} if named else {}
    for shard in (1, 2):
        file = f"pytorch_model-0000{shard}-of-00002.bin"
        zipped(folder / file, program(mapping({GATE: tensor(), f"model.{shard}.weight": tensor((8,))})))
        weights[f"model.{shard}.weight"] = file
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    return ["inspect", str(folder)]


def _changed(root: Path, *, change: Callable[[bytearray], object]) -> list[str]:
    """Write an archive of two matrices and change its bytes."""
    both = mapping({GATE: tensor(), "model.norm.weight": tensor((8,), key="1")})
    file = zipped(root / "input" / _FILE, program(both), storages={"0": bytes(512), "1": bytes(512)})
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    return ["inspect", str(file)]


def _other(root: Path, *, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> list[str]:
    """Write an archive of other members."""
    file = root / "input" / _FILE
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return ["inspect", str(file)]


def _entry(content: bytearray, number: int) -> int:
    """Return where the directory has its entry of this number."""
    at = -1
    for _ in range(number + 1):
        at = content.index(b"PK\x01\x02", at + 1)
    return at


def _put(content: bytearray, at: int, value: bytes) -> None:
    content[at : at + len(value)] = value


def _end(content: bytearray) -> int:
    return content.rindex(b"PK\x05\x06")


def _overlap(content: bytearray) -> None:
    """Let the second storage begin where the first does."""
    first, second = _entry(content, 3), _entry(content, 4)
    _put(content, second + 42, bytes(content[first + 42 : first + 46]))


# name, what is done to the bytes of the archive, what must be said; entries: 0 data.pkl, 3 and 4 storages
_ARCHIVES: tuple[tuple[str, Callable[[bytearray], object], str], ...] = (
    ("encrypted", lambda c: _put(c, _entry(c, 0) + 8, b"\x01"), "encrypted members"),
    ("said to be compressed", lambda c: _put(c, _entry(c, 3) + 10, b"\x08"), "compressed members"),
    ("of two sizes", lambda c: _put(c, _entry(c, 3) + 24, struct.pack("<I", 99)), "compressed members"),
    ("overlapping", _overlap, "overlaps another"),
    ("of one name", lambda c: _put(c, _entry(c, 4) + 46, b"a/data/0"), "two members named 'a/data/0'"),
    ("beyond the end", lambda c: _put(c, _entry(c, 3) + 42, struct.pack("<I", 10**6)), "cut short or broken"),
    ("larger than the file", lambda c: _put(c, _entry(c, 3) + 20, b"\xff\xff\xff\x7f" * 2), "cut short or"),
    ("with a header elsewhere", lambda c: _put(c, _entry(c, 3) + 42, b"\x01"), "cut short or broken"),
    ("in a directory elsewhere", lambda c: _put(c, _end(c) + 16, struct.pack("<I", 10**6)), "cut short or"),
    ("in a directory of 4 GB", lambda c: _put(c, _end(c) + 12, b"\xff" * 4), "cut short or broken"),
    ("in a directory of zip64", lambda c: _put(c, _end(c) + 8, b"\xff" * 12), "cut short or broken"),
    ("without a directory", lambda c: c.__delitem__(slice(_entry(c, 0), None)), "cut short or broken"),
    ("cut short", lambda c: c.__delitem__(slice(len(c) // 2, None)), "cut short or broken"),
)  # fmt: skip

_PICKLE, _NAME = program(mapping({GATE: tensor()})), "a/data.pkl"
# name, members, what must be said
_MEMBERS: tuple[tuple[str, dict[str, bytes], str], ...] = (
    ("no pickle", {"a/data/0": bytes(64)}, "no data.pkl"),
    ("nothing", {"readme.txt": b"hello"}, "no data.pkl"),
    ("two pickles", {_NAME: _PICKLE, "b/data.pkl": _PICKLE}, "2 data.pkl"),
    ("a pickle further in", {"a/b/data.pkl": _PICKLE}, "no data.pkl"),
    (
        "TorchScript",
        {_NAME: _PICKLE, "a/constants.pkl": b"", "a/code/x.py": b"import os"},
        "TorchScript program",
    ),
    ("no storages", {_NAME: _PICKLE}, f"'{GATE}': is broken: its storage '0' is not in the file"),
    ("storages elsewhere", {_NAME: _PICKLE, "a/../data/0": bytes(512)}, "its storage '0' is not in the file"),
    (
        "big-endian values",
        {_NAME: _PICKLE, "a/byteorder": b"big", "a/data/0": bytes(512)},
        "big-endian machine",
    ),
    ("NumPy's arrays", {"arr_0.npy": b"\x93NUMPY"}, "no data.pkl"),
    ("a long directory", {f"a/data/{n:060000}": b"" for n in range(300)}, "larger than 12,000,000 bytes"),
    ("40,000 members", {f"a/data/{n}": b"" for n in range(40_000)}, "no data.pkl"),
)

# name, a tensor, what must be said of it
_TENSORS: tuple[tuple[str, bytes, str], ...] = (
    ("2^40 elements in four bytes", tensor((_WIDE,), (0,)), f"'{GATE}': claims more elements than it holds"),
    ("2^80 elements in four bytes", tensor((_WIDE, _WIDE), (0, 0)), "is broken"),
    ("2^80 elements of which none is", tensor((_WIDE, 0, _WIDE)), "is broken"),
    ("a negative stride", tensor((4, 4), (-4, 1), offset=12), f"'{GATE}': reaches beyond"),
    ("a negative offset", tensor((4, 4), offset=-8), f"'{GATE}': reaches beyond the 512 bytes"),
    ("an offset beyond the end", tensor((4, 4), offset=125), f"'{GATE}': reaches beyond the 512 bytes"),
    ("a stride beyond the end", tensor((2, 2), (200, 1)), f"'{GATE}': reaches beyond the 512 bytes"),
    ("an endless stride", tensor((2, 2), (1 << 62, 1)), f"'{GATE}': reaches beyond the 512 bytes"),
    ("a negative length", tensor((-4, 4), (4, 1)), "is broken"),
    ("a length of 80 bits", tensor((1 << 80,), (1,)), "is broken"),
    ("65 dimensions", tensor((1,) * 65), "is broken"),
    ("other strides than lengths", tensor((4, 4), (1,)), "is broken"),
    ("a larger dtype", tensor((16, 8), kind="torch.DoubleStorage"), f"'{GATE}': claims more elements"),
    ("a storage that is not there", tensor(key="7"), f"'{GATE}': is broken: its storage '7'"),
    ("a storage with a path", tensor(key="../../etc/passwd"), "'../../etc/passwd' is not in the file"),
    ("no values", call("torch._utils._rebuild_meta_tensor_no_storage", named("torch.float32"), numbers((4,)),
                       numbers((1,)), b"\x89"), f"'{GATE}': was saved without values"),
    ("no dtype", call("torch._utils._rebuild_meta_tensor_no_storage", text("float32"), numbers((4,)),
                      numbers((1,)), b"\x89"), "is broken"),
)  # fmt: skip

_STEP = {"exp_avg": tensor(), "exp_avg_sq": tensor()}
_OPTIMIZER = mapping({"state": mapping(_STEP), "param_groups": b"](" + mapping({"lr": number(1)}) + b"e"})
_DEEP = b"}" + (text("model") + b"}") * 1000 + b"s" * 1000
# name, what was saved, what must be said
_WITHOUT: tuple[tuple[str, bytes, str], ...] = (
    ("an empty dict", b"}", "holds no model weights"),
    ("an empty list", b"]", "holds a list"),
    ("a list of tensors", b"](" + tensor() + b"e", "holds a list"),
    ("a tensor", tensor(), "holds a tensor"),
    ("None", b"N", "holds a NoneType"),
    ("a number", number(1), "holds a int"),
    ("text", text("model"), "holds a str"),
    ("settings alone", mapping({"lr": number(1), "epoch": number(3)}), "In it: lr, epoch"),
    ("numbered tensors", b"}" + number(0) + tensor() + b"s", "holds no model weights"),
    ("an optimizer", _OPTIMIZER, "optimizer state only"),
    ("an optimizer by its name", mapping({"optimizer": _OPTIMIZER}), "optimizer state only"),
    ("DeepSpeed's optimizer", mapping({"optimizer_state_dict": _OPTIMIZER}), "zero_to_fp32.py"),
    ("DeepSpeed's objects", call("deepspeed.runtime.zero.config.X"), "holds DeepSpeed's own objects"),
    ("empty tensors", mapping({n: tensor((0,)) for n in ("a", "b")}), "as in a shard of DeepSpeed ZeRO-3"),
    ("a whole module", call("torch.nn.modules.linear.Linear"), "torch.nn.modules.linear.Linear"),
    ("settings of the Trainer", call("transformers.training_args.TrainingArguments"), "settings of the"),
    ("settings of OmegaConf", call("omegaconf.dictconfig.DictConfig"), "an OmegaConf object"),
    ("a thousand envelopes", _DEEP, "holds no model weights"),
    ("keys that can't be printed", mapping({"\x1b[31m\u202ekey": number(1)}), "holds no model weights"),
    ("a key of a megabyte", mapping({"k" * 1_000_000: number(1)}), "holds no model weights"),
)  # fmt: skip

_INT8 = b"(" + text("storage") + named("torch.QInt8Storage") + text("1") + text("cpu") + number(128) + b"tQ"
_SCHEME = b"(" + named("torch.per_tensor_affine") + b"t"
_SHAPE = (number(0), numbers((16, 8)), numbers((8, 1)))
_QUANTISED = call("torch._utils._rebuild_qtensor", _INT8, *_SHAPE, _SCHEME, b"\x89", b"}")
_COPIES = mapping({f"copy {n}": mapping({"w": tensor()}) for n in range(5000)})
# name, what was saved, what must be said
_TOLD: tuple[tuple[str, bytes, str], ...] = (
    ("in two envelopes", mapping({"state_dict": mapping({"model": mapping({GATE: tensor()})})}), "gate_proj"),
    ("under a wrapper's name", mapping({f"module.{GATE}": tensor()}), "names carry a wrapper's prefix"),
    ("beside an optimizer", mapping({"model": mapping({GATE: tensor()}), "optimizer": _OPTIMIZER}),
     "optimizer was left out (2 tensors, 256 elements)"),
    ("beside 5,000 copies", mapping({"model": mapping({GATE: tensor()}), "copies": _COPIES}), "copies was"),
    ("beside 5,000 tensors by number", mapping({GATE: tensor()})
     + b"".join(number(n) + tensor((4,)) + b"s" for n in range(5000)), "4,992 more were left out"),
    ("beside a quantised one", mapping({GATE: tensor(), "w": _QUANTISED}), "quantized (torch.qint8)"),
    ("of a name that is no text", mapping({GATE: tensor(), "\ud800": tensor((8,))}), "in 2 tensors"),
)  # fmt: skip


def _case(name: str, build: partial[list[str]], *says: str, outcome: str = "refused") -> Case:
    assert outcome in ("refused", "told")
    shown = (_FILE, *says)
    return Case(f"torch file: {name}", "archives", build, "told" if outcome == "told" else "refused", shown)


def _old(name: str, *says: str, value: bytes | None = None, **how: object) -> Case:
    saved = mapping({GATE: tensor()}) if value is None else value
    return _case(f"{name}, before torch 1.6", partial(_written, value=saved, write=before, **how), *says)


_SECOND, _COPY = (
    "pytorch_model-00002-of-00002.bin",
    "a second copy, in another file than the index says",
)
_LENGTH = "is cut short or broken: a storage ends at byte"
CASES: tuple[Case, ...] = (
    *(_case(f"members {name}", partial(_changed, change=change), words) for name, change, words in _ARCHIVES),
    *(
        _case(f"members: {name}", partial(_other, members=members), words)
        for name, members, words in _MEMBERS
    ),
    _case(
        "a gigabyte of zeros, compressed",
        partial(_other, members={_NAME: bytes(1 << 26)}, how=zipfile.ZIP_DEFLATED),
        "compressed members",
    ),
    *(
        _case(f"tensor with {name}", partial(_written, value=mapping({GATE: value})), words)
        for name, value, words in _TENSORS
    ),
    *(
        _case(f"{name} and no model", partial(_written, value=value), words)
        for name, value, words in _WITHOUT
    ),
    *(
        _case(f"a model {name}", partial(_written, value=value), words, outcome="told")
        for name, value, words in _TOLD
    ),
    _case(
        "quantised tensors alone",
        partial(_written, value=mapping({GATE: _QUANTISED})),
        "quantized (torch.qint8)",
    ),
    _case("no common name", partial(_against, value=mapping({"other.weight": tensor()})), "other.weight"),
    Case(
        "torch file: a tensor in two shards", "archives", partial(_sharded, named=_SECOND), "told", (_COPY,)
    ),
    Case(
        "torch file: a tensor in two shards, unnamed",
        "archives",
        partial(_sharded, named=None),
        "refused",
        (f"'{GATE}': stored in 'pytorch_model-00001-of-00002.bin' and '{_SECOND}'",),
    ),
    _old("2^60 elements in a storage", _LENGTH, storages=struct.pack("<q", 1 << 60) + bytes(64)),
    _old("a negative length of a storage", _LENGTH, storages=struct.pack("<q", -(1 << 40)) + bytes(64)),
    _old("no storages", "its storages are not the ones that it names", storages=b""),
    _old("a storage twice", "its storages are not the ones that it names", keys=("0", "0")),
    _old("a storage unknown", "its storages are not the ones that it names", keys=("9",)),
    _old("storages that are no list", "its storage '0' is not in the file", keys={"0": 1}),
    _old("big-endian values", "big-endian machine", little=False),
    _old(
        "an endless stride", f"'{GATE}': reaches beyond", value=mapping({GATE: tensor((2, 2), (1 << 62, 1))})
    ),
)
