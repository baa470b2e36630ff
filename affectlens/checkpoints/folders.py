"""Find the files of a checkpoint in a folder: one or shards, safetensors or torch's, an adapter's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.checkpoint import Store
from affectlens.checkpoints.joined import together
from affectlens.checkpoints.safetensors import SafetensorsStore, read_json
from affectlens.errors import CheckpointError
from affectlens.files import ordinary

ADAPTER = "adapter_config.json"
# In the order in which transformers looks; a whole file goes before shards.
_WHOLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE = "non_lora_trainables.bin"  # what LLaVA's trainers save next to an adapter
_OTHERS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_NOT_WEIGHTS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
)


def open_store(path: Path, source: str) -> Store:
    """Open the store of a file or folder; `source` is what opens it again."""
    if not path.is_dir():
        if path.name in _ADAPTERS and (path.parent / ADAPTER).exists():
            return _adapter(path.parent, source)
        return _store(source, [ordinary(path)], read_json(path.parent / "config.json"))
    config = read_json(path / "config.json")
    for name in _WHOLE:
        if not (path / name).exists():
            continue
        sharded = name.endswith(".index.json")
        store = _sharded(path, source, name) if sharded else _store(source, [inside(path, name)], config)
        if (path / ADAPTER).exists():
            store.notes = (*store.notes, "an adapter lies in the same folder, and was not applied")
        return store
    if (path / ADAPTER).exists():
        return _adapter(path, source)
    return _store(source, [inside(path, _only(path))], config)


def is_adapter(path: Path) -> bool:
    """Whether a path is that of a PEFT adapter, and not of a whole model beside one."""
    if not path.is_dir():
        return path.name in _ADAPTERS and (path.parent / ADAPTER).exists()
    return (path / ADAPTER).exists() and not any((path / name).exists() for name in _WHOLE)


def _adapter(folder: Path, source: str) -> Store:
    name = next((name for name in _ADAPTERS if (folder / name).exists()), None)
    if name is None:
        raise CheckpointError(folder, f"an adapter without {' or '.join(_ADAPTERS)}")
    store = _store(source, [inside(folder, name)], {})
    if (folder / _BESIDE).exists():
        return together(store, _store(source, [inside(folder, _BESIDE)], {}))
    return store


def _only(folder: Path) -> str:
    found = sorted(
        file.name
        for pattern in _OTHERS
        for file in folder.glob(pattern)
        if not any(file.match(other) for other in _NOT_WEIGHTS)
    )
    if len(found) == 1:
        return found[0]
    there = sorted(file.name for file in folder.iterdir())[:6]
    if found:
        reason = f"{len(found)} files of weights and no index, so which one is meant is not known"
        raise CheckpointError(folder, reason, fix=f"Name one of {', '.join(found[:6])}")
    reason = f"no checkpoint here: neither {_WHOLE[0]} nor {_WHOLE[1]}, nor torch's or an adapter's files"
    raise CheckpointError(folder, reason, fix=f"In it: {', '.join(there) or 'nothing'}")


def _store(source: str, paths: list[Path], config: Mapping[str, Any]) -> Store:
    above = (folder.name for folder in paths[0].parents if folder.parent.name == "snapshots")
    revision = next(above, "")  # the hub cache files a repository under its commit
    if paths[0].suffix in (".bin", ".pth", ".pt", ".ckpt"):
        from affectlens.checkpoints.pickles import open_pickle

        return open_pickle(paths, source, config=config, revision=revision)
    return SafetensorsStore(source, [LocalFile(path) for path in paths], config=config, revision=revision)


def _sharded(folder: Path, source: str, index: str) -> Store:
    weights = read_json(folder / index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(f, str) for f in weights.values()):
        raise CheckpointError(folder / index, "the index has no weight_map from tensors to files")
    files = [inside(folder, file) for file in sorted(set(weights.values()))]
    store = _store(source, files, read_json(folder / "config.json"))
    for tensor in sorted(weights.keys() - store.headers.keys() - store.aliases.keys()):
        raise CheckpointError(folder / index, "no shard holds this tensor", key=tensor)
    return store


def inside(folder: Path, file: str) -> Path:
    """The path of a file that an index names; raises `CheckpointError` if that lies elsewhere."""
    # An index comes from strangers: `../other.safetensors` or a link must not read a file elsewhere.
    path = folder / file
    if Path(file).name != file:
        raise CheckpointError(folder, f"names a file outside the folder: {file!r}")
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
