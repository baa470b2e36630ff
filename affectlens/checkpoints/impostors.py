"""What people find under the names of checkpoints, told from its first bytes."""

import re
from collections.abc import Iterable

from affectlens.errors import CheckpointError

AGAIN = "Download it again"
_EVERYWHERE = (
    (rb"version https://git-lfs", "this is a Git LFS pointer, not the file", "Run `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "this is a web page, probably an error page", AGAIN),
    (rb"\x1f\x8b", "this is gzip-compressed", "Unpack it first"),
    (rb"GGUF", "this is a GGUF file", "Use the checkpoint that it was made from"),
    (rb"\x89HDF", "this is an HDF5 file, probably from Keras", "Use the PyTorch checkpoint"),
)


def refuse_impostors(path: str, first: bytes, *, others: Iterable[tuple[bytes, str, str]]) -> None:
    """Raise `CheckpointError` for what is known by its first bytes; `others` are of one format alone."""
    for magic, reason, fix in (*_EVERYWHERE, *others):
        if re.match(magic, first, re.IGNORECASE | re.DOTALL):
            raise CheckpointError(path, reason, fix=fix)
