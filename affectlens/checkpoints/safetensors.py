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
_SINGLE = "model.safetensors"
_HASHED = 64_000_000  # bytes; hashing more would cost as much as the diff
_JSON_LIMIT = 64_000_000  # bytes; a config or index beyond this is no config or index


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
        if size <= _HASHED and all(isinstance(file, LocalFile) for file in self.files):
            found["content_sha256"] = _sha256(Span(file, 0, file.size).read() for file in self.files)
        return found


def _sha256(parts: Iterable[bytes | bytearray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def open_safetensors(path: Path, source: str) -> SafetensorsStore:
    """Open a safetensors file, or a folder that holds one or an index of shards.

    `source` is what opens it again: a path or a hub id.
    """
    if not path.is_dir():
        return _store(source, [path], read_json(path.parent / "config.json"))
    config = read_json(path / "config.json")
    # Where both are there, transformers loads the single file; so the diff reads what the lens runs.
    if (path / _SINGLE).exists():
        return _store(source, [_inside(path, _SINGLE)], config)
    if (path / INDEX).exists():
        return _sharded(path, source, config)
    if (path / "adapter_config.json").exists():
        fix = "Merge the adapter into its base first (PEFT's merge_and_unload)"
        raise CheckpointError(path, "this is a PEFT adapter, not a whole checkpoint", fix=fix)
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if len(others) == 1:
        return _store(source, [_inside(path, others[0])], config)
    there = sorted(file.name for file in path.iterdir())[:6]
    reason = "no checkpoint here: neither model.safetensors nor " + INDEX
    raise CheckpointError(path, reason, fix=f"In it: {', '.join(there) or 'nothing'}")


def _store(source: str, paths: list[Path], config: Mapping[str, Any]) -> SafetensorsStore:
    above = (folder.name for folder in paths[0].parents if folder.parent.name == "snapshots")
    revision = next(above, "")  # the hub cache files a repository under its commit
    return SafetensorsStore(source, [LocalFile(path) for path in paths], config=config, revision=revision)


def _sharded(folder: Path, source: str, config: Mapping[str, Any]) -> SafetensorsStore:
    weights = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(f, str) for f in weights.values()):
        raise CheckpointError(folder / INDEX, "the index has no weight_map from tensors to files")
    files = [_inside(folder, file) for file in sorted(set(weights.values()))]
    store = _store(source, files, config)
    for tensor in sorted(weights.keys() - store.headers.keys()):
        raise CheckpointError(folder / INDEX, "no shard holds this tensor", key=tensor)
    return store


def _inside(folder: Path, file: str) -> Path:
    # An index comes from strangers: `../other.safetensors` or a link must not read a file elsewhere.
    path = folder / file
    if Path(file).name != file:
        raise CheckpointError(folder / INDEX, f"names a file outside the folder: {file!r}")
    roots = [folder.resolve(), _blobs(folder)]
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise CheckpointError(path, "links to a file outside the folder")
    if not path.exists():
        raise CheckpointError(path, "the index names this shard, but it is missing")
    return ordinary(path)


def _blobs(folder: Path) -> Path:
    # The hub cache keeps files in <repo>/blobs and links to them from <repo>/snapshots/<revision>/….
    real = folder.resolve()
    cached = next((above for above in real.parents if above.name == "snapshots"), None)
    return cached.parent / "blobs" if cached else real


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is no such file. Raises `CheckpointError`."""
    if not path.exists():
        return {}
    if ordinary(path).stat().st_size > _JSON_LIMIT:
        raise CheckpointError(path, f"larger than {_JSON_LIMIT:,} bytes")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(path, "is not valid JSON") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, "is not a JSON object")
    return found
