"""The store over safetensors files: one, or shards listed by an index."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affectlens.checkpoints.checkpoint import Header
from affectlens.checkpoints.header import FileHeader, read_header
from affectlens.errors import CheckpointError
from affectlens.files import ordinary

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HASHED = 64_000_000  # bytes; hashing more would cost as much as the diff
_JSON_LIMIT = 64_000_000  # bytes; a config or index beyond this is no config or index


class SafetensorsStore:
    """Read tensors from safetensors files; opening reads their headers only."""

    format = "safetensors"

    def __init__(self, source: str, files: list[Path], *, config: Mapping[str, Any]) -> None:
        self.source, self.config = source, config
        self.name = Path(source).name if Path(source).exists() else source
        self._headers: dict[Path, FileHeader] = {file: read_header(file) for file in files}
        self._file: dict[str, Path] = {}
        headers: dict[str, Header] = {}
        for file, header in self._headers.items():
            for tensor, entry in header.tensors.items():
                if tensor in headers:
                    reason = f"also stored in {self._file[tensor].name}"
                    raise CheckpointError(file, reason, key=tensor)
                headers[tensor], self._file[tensor] = entry, file
        self.headers: Mapping[str, Header] = headers
        if not headers:
            raise CheckpointError(source, "holds no tensor")

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor as stored, or some of its rows."""
        from safetensors import safe_open

        with safe_open(self._file[tensor], framework="pt") as file:
            found: Tensor = file.get_tensor(tensor) if rows is None else file.get_slice(tensor)[rows]
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """Hashes, bytes and number of files.

        The header hash covers names, shapes, dtypes and offsets, so base and tuned often share it;
        small checkpoints get a hash of their content too.
        """
        files = sorted(self._headers, key=lambda file: file.name)
        size = sum(header.size for header in self._headers.values())
        found = {
            "header_sha256": _sha256(self._headers[file].digest.encode() for file in files),
            "bytes": size,
            "files": len(files),
        }
        revision = next((above.name for above in files[0].parents if above.parent.name == "snapshots"), None)
        if revision:  # the hub cache files a repository under its commit
            found["revision"] = revision
        if size <= _HASHED:
            found["content_sha256"] = _sha256(file.read_bytes() for file in files)
        return found


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def open_safetensors(path: Path, source: str) -> SafetensorsStore:
    """Open a safetensors file, or a folder that holds one or an index of shards.

    `source` is what opens it again: a path or a hub id.
    """
    if not path.is_dir():
        return SafetensorsStore(source, [ordinary(path)], config=read_json(path.parent / "config.json"))
    config = read_json(path / "config.json")
    # Where both are there, transformers loads the single file; so the diff reads what the lens runs.
    if (path / _SINGLE).exists():
        return SafetensorsStore(source, [_inside(path, _SINGLE)], config=config)
    if (path / INDEX).exists():
        return _sharded(path, source, config)
    if (path / "adapter_config.json").exists():
        fix = "Merge the adapter into its base first (PEFT's merge_and_unload)"
        raise CheckpointError(path, "this is a PEFT adapter, not a whole checkpoint", fix=fix)
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if len(others) == 1:
        return SafetensorsStore(source, [_inside(path, others[0])], config=config)
    there = sorted(file.name for file in path.iterdir())[:6]
    reason = "no checkpoint here: neither model.safetensors nor " + INDEX
    raise CheckpointError(path, reason, fix=f"In it: {', '.join(there) or 'nothing'}")


def _sharded(folder: Path, source: str, config: Mapping[str, Any]) -> SafetensorsStore:
    weights = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(f, str) for f in weights.values()):
        raise CheckpointError(folder / INDEX, "the index has no weight_map from tensors to files")
    files = [_inside(folder, file) for file in sorted(set(weights.values()))]
    store = SafetensorsStore(source, files, config=config)
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
