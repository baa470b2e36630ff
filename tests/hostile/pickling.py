"""Torch files to break, written instruction by instruction."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.hostile.writing import GATE

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def text(value: str) -> bytes:
    """Put text on the stack."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Put a whole number on the stack."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: tuple[int, ...]) -> bytes:
    """Put a tuple of whole numbers on the stack."""
    return b"(" + b"".join(map(number, values)) + b"t"


def named(name: str) -> bytes:
    """Put the object of a name on the stack."""
    module, _, leaf = name.rpartition(".")
    return f"c{module}\n{leaf}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    """Call the function of a name."""
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def tensor(
    shape: tuple[int, ...] = (16, 8),
    strides: tuple[int, ...] | None = None,
    *,
    offset: int = 0,
    key: str = "0",
    kind: str = "torch.FloatStorage",
) -> bytes:
    """Put a tensor on the stack."""
    strides = tuple(int(np.prod(shape[at + 1 :])) for at in range(len(shape))) if strides is None else strides
    storage = b"(" + text("storage") + named(kind) + text(key) + text("cpu") + number(128) + b"tQ"
    hooks = call("collections.OrderedDict")
    parts = (storage, number(offset), numbers(shape), numbers(strides), b"\x89", hooks)
    return call("torch._utils._rebuild_tensor_v2", *parts)


def mapping(items: Mapping[str, bytes]) -> bytes:
    """Put a dict on the stack."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def model(**more: bytes) -> bytes:
    """Return a pickle of a model with one matrix, and more beside it."""
    return program(mapping({GATE: tensor(), **more}))


def program(value: bytes) -> bytes:
    """Return a pickle whose value is the one that these instructions leave on the stack."""
    return b"\x80\x02" + value + b"."


def zipped(
    file: Path, pickled: bytes, *, storages: Mapping[str, bytes] | None = None, **members: bytes
) -> Path:
    """Write an archive as torch does; storage 0 has 128 float32 values."""
    held = {"0": _values()} if storages is None else storages
    with _archive(file) as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little", **members}.items():
            archive.writestr(f"a/{name.replace('__', '.')}", content)
        for key, content in held.items():
            archive.writestr(f"a/data/{key}", content)
    return file


def _archive(file: Path) -> zipfile.ZipFile:
    file.parent.mkdir(parents=True, exist_ok=True)
    return zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)


def before(
    file: Path, pickled: bytes, *, keys: object = ("0",), storages: bytes | None = None, little: bool = True
) -> Path:
    """Write a file like torch before 1.6: five pickles, then the storages with their lengths."""
    about = {"protocol_version": PROTOCOL, "little_endian": little, "type_sizes": {"short": 2}}
    keys = list(keys) if isinstance(keys, tuple) else keys
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, about))
    held = struct.pack("<q", 128) + _values() if storages is None else storages
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(head + pickled + pickle.dumps(keys, 2) + held)
    return file


def _values() -> bytes:
    return np.random.default_rng(0).standard_normal(128, np.float32).tobytes()
