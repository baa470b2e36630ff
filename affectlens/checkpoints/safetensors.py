"""The store over safetensors files: one, or shards listed by an index."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affectlens.checkpoints.bytes import Bytes, LocalFile, Span
from affectlens.checkpoints.checkpoint import Header
from affectlens.checkpoints.header import read_header
from affectlens.errors import CheckpointError
from affectlens.files import ordinary

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
HASHED = 64_000_000  # bytes; hashing more would cost as much as the diff
JSON_LIMIT = 64_000_000  # bytes; a config or index beyond this is no config or index


class SafetensorsStore:
    """Read tensors from safetensors files, here or on a hub; opening reads their headers only."""

    format = "safetensors"

    def __init__(
        self,
        source: str,
        files: Sequence[Bytes],
        *,
        config: Mapping[str, Any],
        revision: str = "",
    ) -> None:
        self.source, self.config, self.revision = source, config, revision
        self.name = Path(source).name if Path(source).exists() else source
        self.files = sorted(files, key=lambda file: file.name)
        self._digests: list[str] = []
        self._spans: dict[str, Span] = {}
        headers: dict[str, Header] = {}
        for file in self.files:
            header = read_header(file)
            for tensor in sorted(header.tensors.keys() & headers.keys()):
                other = Path(self._spans[tensor].of.name).name
                raise CheckpointError(file.name, f"also stored in {other}", key=tensor)
            headers |= header.tensors
            self._spans |= header.spans
            self._digests.append(header.digest)
        self.headers: Mapping[str, Header] = headers
        self.skipped: Mapping[str, tuple[str, int]] = {}
        self.aliases: Mapping[str, str] = {}
        self.notes: tuple[str, ...] = ()
        if not headers:
            raise CheckpointError(source, "holds no tensor")

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
        return found


def _sha256(parts: Iterable[bytes | bytearray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is no such file. Raises `CheckpointError`."""
    if not path.exists():
        return {}
    if ordinary(path).stat().st_size > JSON_LIMIT:
        raise CheckpointError(path, f"larger than {JSON_LIMIT:,} bytes")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(path, "is not valid JSON") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, "is not a JSON object")
    return found
