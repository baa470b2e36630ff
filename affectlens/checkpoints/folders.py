"""Find the files of a checkpoint in a folder: its weights, an adapter, and the files to copy with them."""

import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.documents import Document, plain_name, read_json, weight_map
from affectlens.checkpoints.safetensors import SafetensorsStore
from affectlens.checkpoints.store import Store, together
from affectlens.errors import CheckpointError, quoted
from affectlens.printable import plain

_LONGEST = 80  # characters shown of each name in a list of files
ADAPTER = "adapter_config.json"
RECORD = "affectlens.json"  # says how a checkpoint was edited
# In the order in which transformers looks for them; a whole file goes before shards.
_WHOLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE = "non_lora_trainables.bin"  # LLaVA's trainers save it next to an adapter
_TORCH = (".bin", ".pth", ".pt", ".ckpt")
_OTHERS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
# Opened only so that the error can name their format.
_FOREIGN = ("*.gguf", "*.ckpt", "*.npz", "*.h5", "*.msgpack", "*.onnx")
_NOT_WEIGHTS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
)
# Files that transformers reads beside the weights.
KNOWN = re.compile(
    r"(?:generation_|processor_|preprocessor_|video_preprocessor_|tokenizer_)?config\.json"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|tekken\.json|chat_template\.(?:json|jinja)"
    r"|additional_chat_templates/[^/]+\.jinja"
    r"|(?:[\w-]*vocab[\w-]*|merges|dict|normalizer|emoji|byte_maps|word_\w+)\.(?:json|txt)"
    r"|[\w.-]+\.(?:model(?:\.v\d+)?|spm|codes|tokenizer|tiktoken)"
)
# Files that a model's own Python code may read as well.
BESIDE_CODE = re.compile(KNOWN.pattern + r"|[^/]+\.(?:json|txt|jinja)|.+\.py")
_NOT = ("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_MOST = 2000  # files


def open_store(path: Path, source: str) -> Store:
    """Open the store of a file or folder; `source` is the path or hub id that opens it again."""
    if not path.is_dir():
        if path.name in _ADAPTERS and _there(path.parent, ADAPTER):
            return _adapter(path.parent, source)
        return _store(source, [path], path.parent)
    for name in _WHOLE:
        if _there(path, name):
            store = _model(path, source, name)
            index = f"{name}.index.json"
            if _there(path, index):  # its shards may hold other tensors
                store.notes = (*store.notes, f"{index} in the same folder was not read")
            if _there(path, ADAPTER):
                store.notes = (*store.notes, "an adapter in the same folder was not applied")
            if _there(path, RECORD):
                store.notes = (*store.notes, f"{RECORD} in the same folder says how it was edited")
            return store
    if _there(path, ADAPTER):
        return _adapter(path, source)
    return _store(source, [inside(path, _only(path))], path)


def is_adapter(path: Path) -> bool:
    """Return whether a path is a PEFT adapter, and not a whole model with one beside it."""
    if not path.is_dir():
        return path.name in _ADAPTERS and _there(path.parent, ADAPTER)
    return _there(path, ADAPTER) and not any(_there(path, name) for name in _WHOLE)


def adapter_config(path: Path) -> Mapping[str, Any]:
    """Return the config of an adapter, empty for a path that is not one. Raises `CheckpointError`."""
    if not is_adapter(path):
        return {}
    file = inside(path if path.is_dir() else path.parent, ADAPTER)
    return read_json(file).strict(file)


def inside(folder: Path, file: str) -> Path:
    """Return the path of a file in a folder; raises `CheckpointError` if it leads out of it.

    An index comes from strangers: neither `../other.safetensors` nor a link may read a file elsewhere.
    """
    path = folder / file
    if not plain_name(file):
        raise CheckpointError(folder, f"names a file outside the folder: {quoted(file)}")
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        raise CheckpointError(folder, f"names a file by an invalid name: {quoted(file)}") from None
    if not any(real.is_relative_to(root) for root in (Path(os.path.realpath(folder)), _blobs(folder))):
        raise CheckpointError(path, "links to a file outside the folder")
    if not _there(folder, file):
        raise CheckpointError(path, "the index names this shard, but it is missing")
    return path


def visible(folder: Path, *, code: bool) -> list[str]:
    """Return the files of a folder that a copy of its model needs, by their paths in the folder.

    With `code`, also what the model's own Python code may read. Raises `CheckpointError` for too many.
    """
    found = []
    for place, folders, files in os.walk(folder):  # follows no links
        folders[:] = [name for name in folders if code or name == "additional_chat_templates"]
        inner = Path(place).relative_to(folder)
        names = [(inner / name).as_posix() for name in files]
        found += [
            name for name in names if (BESIDE_CODE if code else KNOWN).fullmatch(name) and name not in _NOT
        ]
        if len(found) > _MOST:
            raise CheckpointError(folder, f"holds more than {_MOST:,} files to copy")
    return sorted(found)


def _there(folder: Path, name: str) -> bool:
    # A dangling link counts, so that reading it fails; otherwise another file would be opened instead.
    return os.path.lexists(folder / name)


def _model(folder: Path, source: str, name: str) -> Store:
    if not name.endswith(".index.json"):
        return _store(source, [inside(folder, name)], folder)
    index, suffixes = inside(folder, name), (".safetensors",) if "safetensors" in name else _TORCH
    weights = weight_map(read_json(index), str(index), suffixes=suffixes)
    files = [inside(folder, file) for file in sorted(set(weights.values()))]
    store = _store(source, files, folder, weights=weights)
    for tensor in sorted(weights.keys() - store.headers.keys() - store.aliases.keys() - store.skipped.keys()):
        raise CheckpointError(index, "no shard holds this tensor", key=tensor)
    return store


def _adapter(folder: Path, source: str) -> Store:
    name = next((name for name in _ADAPTERS if _there(folder, name)), None)
    if name is None:
        raise CheckpointError(folder, f"this adapter has no {' or '.join(_ADAPTERS)}")
    store = _store(source, [inside(folder, name)], None)
    if _there(folder, _BESIDE):
        return together(store, _store(source, [inside(folder, _BESIDE)], None))
    return store


def _only(folder: Path) -> str:
    try:
        there = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise CheckpointError(folder, f"can't be read ({error.strerror})") from None
    found = [name for name in _matching(there, _OTHERS) if not _matching([name], _NOT_WEIGHTS)]
    foreign = _matching(there, _FOREIGN)
    if len(found) == 1 or (foreign and not found):
        return (found or foreign)[0]
    if found:
        reason = f"{len(found)} files of weights and no index, so it is unclear which one to open"
        raise CheckpointError(folder, reason, fix=f"Name one of {_listed(found)}")
    reason = (
        f"no checkpoint here: neither {_WHOLE[0]} nor {_WHOLE[1]}, and no files of torch or of an adapter"
    )
    raise CheckpointError(folder, reason, fix=f"In it: {_listed(there) or 'nothing'}")


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _listed(names: list[str]) -> str:
    return ", ".join(plain(name, _LONGEST) for name in names[:6])


def _store(
    source: str, paths: list[Path], folder: Path | None, *, weights: Mapping[str, str] | None = None
) -> Store:
    """Open a store over files, with the config of the model's `folder`; an adapter has none."""
    config = _config(folder) if folder else Document({})
    above = (folder.name for folder in paths[0].parents if folder.parent.name == "snapshots")
    revision = next(above, "")  # the hub's cache names a snapshot after its commit
    if paths[0].suffix in _TORCH:
        from affectlens.checkpoints.pickles.torch_store import open_pickle

        store: Store = open_pickle(paths, source, config=config.content, revision=revision, weights=weights)
    else:
        files = [LocalFile(path) for path in paths]
        store = SafetensorsStore(source, files, config=config.content, revision=revision, weights=weights)
    store.notes = (*store.notes, *config.notes("config.json"))
    return store


def _config(folder: Path) -> Document:
    return read_json(inside(folder, "config.json")) if _there(folder, "config.json") else Document({})


def _blobs(folder: Path) -> Path:
    # The hub's cache keeps files in <repo>/blobs and links to them from <repo>/snapshots/<revision>/….
    real = Path(os.path.realpath(folder))
    cached = next((above for above in real.parents if above.name == "snapshots"), None)
    return cached.parent / "blobs" if cached and "--" in cached.parent.name else real
