"""Files of other formats under the name of a checkpoint: the error names the format and says what to do."""

import gzip
import io
import struct
import tarfile
import zipfile
from functools import partial
from pathlib import Path

from tests.hostile.case import Case

_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
_ENDLESS = _GGUF + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**63)  # an array of 2^63 bytes


def _zip(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())
    return stream.getvalue()


# name, content, what must be said
_KINDS: tuple[tuple[str, bytes, tuple[str, ...]], ...] = (
    ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
     ("LFS pointer", "git lfs pull")),
    ("web page", b"<!DOCTYPE html><html><body>404</body></html>", ("web page",)),
    ("web page in capitals", b"\n\n  <HTML><BODY>Sign in</BODY></HTML>", ("web page",)),
    ("XML", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ("web page",)),
    ("JSON", b'{"error": "Access to model is restricted"}', ("JSON text",)),
    ("message", b"Entry not found", ("text",)),
    ("zip", _zip(model=b"x"), ("zip archive",)),
    ("NumPy archive", _zip(arr_0__npy=b"\x93NUMPY"), ("NumPy .npz",)),
    ("pickle", b"\x80\x04}\x94.", ("pickle",)),
    ("gzip", gzip.compress(bytes(99)), ("gzip",)),
    ("xz", b"\xfd7zXZ\0\0\x04" + bytes(99), ("xz-compressed",)),
    ("zstd", b"\x28\xb5\x2f\xfd" + bytes(99), ("zstd",)),
    ("bzip2", b"BZh91AY&SY" + bytes(99), ("bzip2",)),
    ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), ("7z archive",)),
    ("RAR", b"Rar!\x1a\x07\x01\0" + bytes(99), ("RAR",)),
    ("tar", _tar(), ("tar archive",)),
    ("GGUF", _GGUF + bytes(99), ("GGUF", "made from")),
    ("endless GGUF", _ENDLESS, ("GGUF", "made from")),
    ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(99), ("HDF5",)),
    ("NumPy", b"\x93NUMPY\x01\0" + bytes(99), ("NumPy",)),
    ("ELF", b"\x7fELF\x02\x01\x01" + bytes(99), ("program",)),
    ("PE", b"MZ\x90\0\x03\0\0\0" + bytes(99), ("program",)),
    ("PNG", b"\x89PNG\r\n\x1a\n" + bytes(99), ("image",)),
    ("JPEG", b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(99), ("image",)),
    ("PDF", b"%PDF-1.7\n" + bytes(99), ("PDF",)),
    ("noise", bytes(range(7, 207)), ("the header claims",)),
)  # fmt: skip
# Those that bear the name of torch's file, too.
_TORCH = ("pointer", "web page", "JSON", "gzip", "GGUF", "endless GGUF", "HDF5", "tar", "ELF", "PNG")


def _file(root: Path, *, name: str, content: bytes) -> list[str]:
    (root / "input").mkdir()
    (root / "input" / name).write_bytes(content)
    return ["inspect", str(root / "input")]


def _itself(root: Path, *, name: str, content: bytes) -> list[str]:
    _file(root, name=name, content=content)
    return ["diff", *2 * [str(root / "input" / name)]]


_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
CASES: tuple[Case, ...] = (
    *(
        Case(
            f"impostor: {kind}",
            "impostors",
            partial(_file, name=_SAFETENSORS, content=content),
            "refused",
            (_SAFETENSORS, *says),
        )
        for kind, content, says in _KINDS
    ),
    *(
        Case(
            f"impostor: {kind} as .bin",
            "impostors",
            partial(_file, name=_BIN, content=content),
            "refused",
            (_BIN, *says),
        )
        for kind, content, says in _KINDS
        if kind in _TORCH
    ),
    *(
        Case(
            f"impostor: {name} alone",
            "impostors",
            partial(build, name=name, content=content),
            "refused",
            says,
        )
        for name, content, says, build in (
            ("model-Q4_K_M.gguf", _ENDLESS, ("model-Q4_K_M.gguf", "GGUF", "made from"), _file),
            ("model.gguf", _GGUF, ("model.gguf", "GGUF", "made from"), _itself),
            ("tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), ("tf_model.h5", "HDF5"), _file),
            ("weights.npz", _zip(arr_0__npy=b"\x93NUMPY"), ("weights.npz", "NumPy"), _file),
            ("model.tar.gz", gzip.compress(bytes(99)), ("gzip",), _itself),
        )
    ),
)
