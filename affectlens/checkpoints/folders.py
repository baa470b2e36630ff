"""Find the files of a checkpoint in a folder: its weights, an adapter, and the files to copy with them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affectlens.checkpoints.adapters.factor_names import FACTOR, owner_of
from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.documents import Document, plain_name, read_json, weight_map
from affectlens.checkpoints.safetensors import SafetensorsStore
from affectlens.checkpoints.store import Store, together
from affectlens.checkpoints.weight_files import (
    WHOLE,
    adapters_among,
    folders_with_weights,
    foreign_among,
    listed,
    mlx_adapter,
    no_checkpoint,
    weights_among,
)
from affectlens.errors import CheckpointError, quoted
from affectlens.sites import bare_name

ADAPTER = "adapter_config.json"
_PARAMS = "params.json"
RECORD = "affectlens.json"  # says how a checkpoint was edited
# In the order in which transformers looks for them; a whole file goes before shards.
_WHOLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_TORCH = (".bin", ".pth", ".pt", ".ckpt")
_REQUIRED = "non_lora_"  # files that trainers save with an adapter; one that can't be read is an error
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
_NO_CONFIG = (
    f"it has no {ADAPTER}, which says its alpha: copy that file beside it, as by "
    f"`hf download OWNER/NAME {ADAPTER} --local-dir FOLDER`"
)
_PART = re.compile(r"consolidated\.\d+\.(?:pth|pt|safetensors)")
_JOIN_PARTS = (
    "Join them with convert_llama_weights_to_hf.py of the transformers repository: --input_dir FOLDER "
    "--output_dir OUT"
)
_NOT = ("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_MOST = 2000  # files


def open_store(path: Path, source: str) -> Store:
    """Open the store of a file or folder; `source` is the path or hub id that opens it again."""
    if not path.is_dir():
        if path.name in _ADAPTERS and _there(path.parent, ADAPTER):
            return _adapter(path.parent, source)
        return _lone(source, path)
    for name in _WHOLE:
        if _there(path, name):
            store = _model(path, source, name)
            index = f"{name}.index.json"
            if _there(path, index):  # its shards may hold other tensors
                store.notes = (*store.notes, f"{index} in the same folder was not read")
            if unread := _unread(path, name):
                store.notes = (*store.notes, f"{listed(unread)} in the same folder: not read")
            if _there(path, ADAPTER):
                store.notes = (*store.notes, "an adapter in the same folder was not applied")
            if _there(path, RECORD):
                store.notes = (*store.notes, f"{RECORD} in the same folder says how it was edited")
            return store
    if _there(path, ADAPTER):
        return _adapter(path, source)
    return _lone(source, inside(path, _only(path)))


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


def _lone(source: str, file: Path) -> Store:
    store = _store(source, [file], file.parent)
    if any(tensor.endswith((".lora_a", ".lora_b")) for tensor in store.headers):
        raise mlx_adapter(file.parent)
    if file.name in _ADAPTERS:
        store.notes = (*store.notes, _NO_CONFIG)
    return store


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


def _unread(folder: Path, name: str) -> list[str]:
    """Return other files of weights beside a model: heads, projectors, shards that its index lacks."""
    own = [name]
    if name.endswith(".index.json"):
        own = list(read_json(inside(folder, name)).content["weight_map"].values())
    known = (*own, *_ADAPTERS)
    # A shard that the index lacks is worth a word, another form of the same weights is not.
    forms = (
        name
        for name in weights_among(_names(folder))
        if name.startswith("model") or not WHOLE.fullmatch(name)
    )
    return [name for name in forms if name not in known]


def _adapter(folder: Path, source: str) -> Store:
    name = next((name for name in _ADAPTERS if _there(folder, name)), None)
    if name is None:
        config = read_json(inside(folder, ADAPTER)).content
        if "fine_tune_type" in config or "lora_parameters" in config:
            raise mlx_adapter(folder)
        raise CheckpointError(folder, f"this adapter has no {' or '.join(_ADAPTERS)}")
    store: Store = _store(source, [inside(folder, name)], None)
    changed = {bare_name(owner_of(tensor)) for tensor in store.headers if FACTOR.search(tensor)}
    there = _names(folder)
    notes = [f"{file} beside the adapter can't be read" for file in foreign_among(there)]
    notes += [
        f"the folder {name} beside the adapter holds weights too; they were not read"
        for name in folders_with_weights(folder, there, steps=False)
    ]
    for file in weights_among(there):
        if file in _ADAPTERS:
            continue
        if file not in adapters_among([file]):
            notes.append(f"{file} beside the adapter was not read: by its name it holds a whole model")
            continue
        try:
            more = _store(source, [inside(folder, file)], None)
        except CheckpointError as error:
            if file.startswith(_REQUIRED):
                raise
            notes.append(f"{file} beside the adapter was not read: {error.reason}")
            continue
        known, new = ({bare_name(tensor) for tensor in one.headers} for one in (store, more))
        if new <= known:
            notes.append(f"{file} beside the adapter was not read: it repeats its tensors")
        elif changed and changed <= new:
            notes.append(f"{file} beside the adapter was not read: it holds a whole model")
        else:
            notes.append(f"{file} beside the adapter was read with it ({len(new)} tensors)")
            store = together(store, more)
    store.notes = (*store.notes, *notes)
    return store


def _only(folder: Path) -> str:
    there = _names(folder)
    found, foreign = weights_among(there), foreign_among(there)
    if len(found) == 1 or (foreign and not found):
        return (found or foreign)[0]
    parts = [name for name in found if _PART.fullmatch(name)]
    if len(parts) > 1 and len(parts) == len(found):
        reason = f"{len(parts)} model-parallel parts in Meta's format"
        raise CheckpointError(folder, reason, fix=_JOIN_PARTS)
    if found:
        reason = f"{len(found)} files of weights and no index, so it is unclear which one to open"
        raise CheckpointError(folder, reason, fix=f"Name one of {listed(found)}")
    raise no_checkpoint(folder, there)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise CheckpointError(folder, f"can't be read ({error.strerror})") from None


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
    if _there(folder, "config.json"):
        return read_json(inside(folder, "config.json"))
    try:  # what Meta and Mistral write in its place
        return read_json(inside(folder, _PARAMS)) if _there(folder, _PARAMS) else Document({})
    except CheckpointError:  # a file of any tool may have this name
        return Document({})


def _blobs(folder: Path) -> Path:
    # The hub's cache keeps files in <repo>/blobs and links to them from <repo>/snapshots/<revision>/….
    real = Path(os.path.realpath(folder))
    cached = next((above for above in real.parents if above.name == "snapshots"), None)
    return cached.parent / "blobs" if cached and "--" in cached.parent.name else real
