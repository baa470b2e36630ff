"""The store over safetensors files: one, or shards listed by an index."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from affectlens.checkpoints.bytes import Bytes, LocalFile, Span
from affectlens.checkpoints.checkpoint import Header
from affectlens.checkpoints.header import MOST, FileHeader, read_header
from affectlens.checkpoints.indexes import counting, elsewhere
from affectlens.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
HASHED = 64_000_000  # bytes; hashing more would cost as much as the diff


class SafetensorsStore:
    """Read tensors from safetensors files, here or on a hub; opening reads their headers only.

    `weights` is the index: the file of each tensor, which decides where two files hold one.
    """

    format = "safetensors"

    def __init__(
        self,
        source: str,
        files: Sequence[Bytes],
        *,
        config: Mapping[str, Any],
        revision: str = "",
        weights: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.config, self.revision = source, config, revision
        self.name = Path(source).name if Path(source).exists() else source
        self.files = sorted(files, key=lambda file: file.name)
        self.aliases: Mapping[str, str] = {}
        found = {_name(file): read_header(file) for file in self.files}
        where, self.skipped = _sorted_out(found, weights or {}, source)
        self.headers: Mapping[str, Header] = {name: found[file].tensors[name] for name, file in where.items()}
        self._spans = {name: found[file].spans[name] for name, file in where.items()}
        self._digests = [header.digest for header in found.values()]
        self.notes: tuple[str, ...] = elsewhere(weights or {}, where)
        if len(where) > MOST:
            raise CheckpointError(source, f"holds more than {MOST:,} tensors")
        if not where:
            reason = "holds no tensor that can be read" if self.skipped else "holds no tensor"
            raise CheckpointError(self.files[0].name if len(self.files) == 1 else source, reason)

    def span(self, tensor: str) -> Span:
        """Where the bytes of a tensor are."""
        return self._spans[tensor]

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor as stored, or some of its rows."""
        from affectlens.checkpoints.slicing import tensor_of

        return tensor_of(self._spans[tensor], self.headers[tensor], rows=rows)

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        for file in self.files:
            file.check()

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes, bytes and number of files.

        The header hash covers names, shapes, dtypes and offsets, so base and tuned often share it;
        small checkpoints on this machine get a hash of their content too.
        """
        size = sum(file.size for file in self.files)
        found = {
            "header_sha256": _sha256(digest.encode() for digest in self._digests),
            "bytes": size,
            "files": len(self.files),
        }
        if self.revision:
            found["revision"] = self.revision
        if size <= HASHED and all(isinstance(file, LocalFile) for file in self.files):
            found["content_sha256"] = _sha256(Span(file, 0, file.size).read() for file in self.files)
            self.check()
        return found


def _sha256(parts: Iterable[bytes | bytearray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _name(file: Bytes) -> str:
    name = Path(file.name).name
    return unquote(name) if file.remote else name


def _sorted_out(
    found: Mapping[str, FileHeader], weights: Mapping[str, str], source: str
) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """The file that counts of each tensor, and what is not read: why, and its elements."""
    shapes = {file: {name: h.shape for name, h in header.tensors.items()} for file, header in found.items()}
    where, copies = counting(shapes, weights, source=source)
    skipped = {name: why for header in found.values() for name, why in header.skipped.items()}
    return where, skipped | copies
