"""What is written from: the files of a base, where they lie, and which of them go into the copy.

base (folder, file, hub id, Checkpoint) ──▶ Ground: the checkpoint to edit, its folder, its weights
an adapter over its base                ──▶ the Ground of that base, with the adapter's sites put in first
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.folders import open_store
from affectlens.checkpoints.indexes import weight_map
from affectlens.checkpoints.parsing import read_json
from affectlens.checkpoints.pickles.store import PickleStore
from affectlens.checkpoints.quantized import QuantizedStore, unpacked
from affectlens.checkpoints.safetensors import INDEX, SafetensorsStore
from affectlens.errors import CheckpointError
from affectlens.interventions.transplant import Transplant
from affectlens.interventions.writing.accompanying import BESIDE
from affectlens.interventions.writing.sharding import SINGLE
from affectlens.sites import Sites

_UNQUANTISED = "Edit the unquantised checkpoint"


@dataclass(frozen=True)
class Ground:
    """A base as it is edited and copied."""

    live: Checkpoint
    folder: Path
    first: tuple[Transplant, ...] = ()  # of an adapter
    files: Mapping[str, LocalFile] | None = None  # by the names they get; None where new ones are made
    index: Path | None = None

    @property
    def reserved(self) -> tuple[Path, ...]:
        """Where nothing may be written: a base that is a folder is one thing, a file has others beside it."""
        return (self.folder,) if os.path.isdir(self.live.store.source) else ()  # noqa: PTH112

    def refuse(self, edited: frozenset[str]) -> None:
        """Raise `CheckpointError` where some tensors can't get new values in their files."""
        store = self.live.store
        for tensor in sorted(edited):
            if self.files is not None and store.span(tensor) is None:
                raise CheckpointError(
                    store.name,
                    "is stored packed, so no weights can be put there",
                    key=tensor,
                    fix=_UNQUANTISED,
                )
            if any(name.startswith(f"{tensor} in ") for name in store.skipped):
                fix = "Save the model anew with save_pretrained"
                raise CheckpointError(store.name, "lies in two files", key=tensor, fix=fix)


def ground(base: Source) -> Ground:
    """Find the files of a base; those of a hub are fetched into its cache. Raises `CheckpointError`."""
    opened = open_checkpoint(base)
    first: tuple[Transplant, ...] = ()
    if opened.change is not None:
        first = (Transplant(changed(opened), donor=opened),)
        opened = opened.change.base
    store = opened.store
    if not store.source:
        fix = "Save it with save_pretrained, and name the folder"
        raise CheckpointError(store.name, "is only in memory, so there are no files to copy", fix=fix)
    if not os.path.exists(store.source):  # noqa: PTH110  for any string, where Path.exists raises
        opened = _fetched(opened)
    return _placed(opened, first)


def changed(adapter: Checkpoint) -> Sites:
    """The sites of its base that an adapter changes."""
    assert adapter.change is not None
    base = adapter.change.base
    return Sites(site for site in base.sites if adapter.targeted(site))


def _fetched(opened: Checkpoint) -> Checkpoint:
    """The same, as files in the hub's cache."""
    from affectlens.checkpoints.hub.downloading import fetched

    repository, _, asked = opened.store.source.partition("@")
    commit = str(opened.store.facts.get("revision", "")) or asked
    hub_id = f"{repository}@{commit}" if commit else repository
    folder = fetched(hub_id, re.compile(BESIDE))
    store = open_store(folder, str(folder))
    store.name = opened.store.name
    return Checkpoint(unpacked(store))


def _placed(live: Checkpoint, first: tuple[Transplant, ...]) -> Ground:
    path = Path(live.store.source)
    folder = path if path.is_dir() else path.parent
    raw = live.store.inner if isinstance(live.store, QuantizedStore) else live.store
    if isinstance(raw, SafetensorsStore):
        files = {Path(file.name).name: file for file in raw.files if isinstance(file, LocalFile)}
        index = _index(folder, files)
        if index is None and len(files) == 1:
            files = dict(zip([SINGLE], files.values(), strict=True))
        return Ground(live, folder, first, files, index)
    _refuse_new(live)
    return Ground(live, folder, first)


def _refuse_new(live: Checkpoint) -> None:
    """Raise `CheckpointError` where the tensors that can be read are not all that the files hold."""
    store = live.store
    if isinstance(store, QuantizedStore):
        raise CheckpointError(
            store.name, "quantised weights in torch's files can't be written", fix=_UNQUANTISED
        )
    if not isinstance(store, PickleStore):
        fix = "Merge it with PEFT first"
        raise CheckpointError(store.name, "a model and its adapter in one file can't be written", fix=fix)
    for tensor, (why, _) in store.skipped.items():
        raise CheckpointError(store.name, f"can't be read, so it can't be written: {why}", key=tensor)


def _index(folder: Path, files: Mapping[str, LocalFile]) -> Path | None:
    """The index of these files, if they are what it lists."""
    path = folder / INDEX
    if not os.path.lexists(path):
        return None
    listed = weight_map(read_json(path), str(path), suffixes=(".safetensors",))
    return path if set(listed.values()) == set(files) else None
