"""What people find under the names of checkpoints, told from its first bytes."""

import re
from collections.abc import Iterable

from affectlens.errors import CheckpointError

AGAIN = "Download it again"
FIRST = 512  # bytes that tell; a tar archive says what it is at 257
_UNPACK = "Unpack it first"
_EVERYWHERE = (
    (rb"version https://git-lfs", "this is a Git LFS pointer, not the file", "Run `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "this is a web page, probably an error page", AGAIN),
    (
        rb"GGUF",
        "this is a GGUF file, llama.cpp's format, which is not read here",
        "Use the safetensors checkpoint that it was made from",
    ),
    (rb"\x89HDF", "this is an HDF5 file, probably from Keras", "Use the PyTorch checkpoint"),
    (rb"\x93NUMPY", "this is a NumPy array", "Use the PyTorch checkpoint"),
    (rb"\x1f\x8b", "this is gzip-compressed", _UNPACK),
    (rb"\xfd7zXZ", "this is xz-compressed", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "this is zstd-compressed", _UNPACK),
    (rb"BZh[1-9]1AY", "this is bzip2-compressed", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "this is a 7z archive", _UNPACK),
    (rb"Rar!", "this is a RAR archive", _UNPACK),
    (rb".{257}ustar", "this is a tar archive", _UNPACK),
    (
        rb"\x7fELF|MZ.{2}[^\0]|MZ.{6}[^\0]|\xcf\xfa\xed\xfe",
        "this is a program, not a checkpoint",
        "Don't run it",
    ),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP", "this is an image", AGAIN),
    (rb"%PDF", "this is a PDF document", AGAIN),
    (rb"\s*[{\[]\s*[\"{\[]", "this is JSON text, probably an error message or an index", AGAIN),
)


def refuse_impostors(path: str, first: bytes, *, others: Iterable[tuple[bytes, str, str]]) -> None:
    """Raise `CheckpointError` for what is known by its first bytes; `others` are of one format alone."""
    for magic, reason, fix in (*_EVERYWHERE, *others):
        if re.match(magic, first, re.IGNORECASE | re.DOTALL):
            raise CheckpointError(path, reason, fix=fix)
