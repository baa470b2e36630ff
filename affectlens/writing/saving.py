"""Write an edited checkpoint: streamed from the files of its base, without building a model.

base ── grounding ──▶ Ground ─┬─ edited ──▶ EditedStore ── sharding ──▶ weights ┐
                              └─ accompanying ──▶ config, tokenizer, code ──────┼─ filling ──▶ a folder
interventions ── edits ───────── recording ──▶ affectlens.json ────────────────┘
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.documents import read_json, weight_map
from affectlens.checkpoints.folders import open_store
from affectlens.checkpoints.pickles.torch_store import PickleStore
from affectlens.checkpoints.quantized import QuantizedStore, unpacked
from affectlens.checkpoints.safetensors import INDEX, SafetensorsStore
from affectlens.errors import CheckpointError, LensError
from affectlens.interventions.transplant import Transplant
from affectlens.lens import ActivationIntervention, Intervention
from affectlens.sites import Sites
from affectlens.writing.edited_store import EditedStore
from affectlens.writing.folder import BESIDE, accompany, filled
from affectlens.writing.provenance import AppliedIntervention, record, write_record
from affectlens.writing.shards import SINGLE, rewrite, write_new

Written = Intervention | ActivationIntervention  # the latter to be refused in words
_UNQUANTISED = "Edit the unquantised checkpoint"


def write(
    base: Source,
    interventions: Written | Iterable[Written],
    out: str | Path,
    *,
    link: bool = False,
) -> Checkpoint:
    """Write `base` with weight interventions in it into a new folder, and return what is there.

    Interventions are put in in order, each seeing what those before it left, as in `lens.intervene`. The
    folder loads in transformers; `affectlens.json` in it says what was done. Files without an edit are copied
    as they are; with `link` they are the base's own files under a second name, and a program that later
    writes into them changes the base too. An adapter over its base is written merged.

    Raises `WriteError` where `out` is there already (an empty folder may be), lies in the base's folder, or
    can't be written; `CheckpointError` for a base in memory or with edits where it is stored packed;
    `LensError` for an intervention on activations. Nothing is left then.
    """
    listed = interventions if isinstance(interventions, Iterable) else [interventions]
    found = ground(base)
    store, steps = _edited(found.live, [*found.first, *listed])
    edited = frozenset(found.live.at(site).tensor for step in steps for site in step.sites)
    found.refuse(edited)
    with filled(out, apart_from=found.reserved) as room:
        _fill(room, found, store, edited=edited, link=link)
        write_record(record(found.live, steps), room)
        for checkpoint in (found.live, *(step.donor for step in steps if step.donor is not None)):
            checkpoint.store.check()
    return open_checkpoint(out)


def _edited(
    live: Checkpoint, interventions: Sequence[object]
) -> tuple[EditedStore, tuple[AppliedIntervention, ...]]:
    """Lay the edits of interventions over one another; raises what an intervention raises."""
    steps, store = [], None
    for one in interventions:
        if not isinstance(one, Intervention):
            raise LensError(
                f"{type(one).__name__} changes no weights, and weights are what a checkpoint holds"
            )
        intervention, donor = _with_donor(one, live)
        edits = intervention.edits(live)
        if not edits:
            raise LensError(f"{type(one).__name__} changes activations here, and a checkpoint holds weights")
        store = EditedStore(live, edits)
        live = Checkpoint(store)
        steps.append(AppliedIntervention(intervention, Sites(edits), donor))
    if store is None:
        raise LensError("no intervention, so there is nothing to write")
    return store, tuple(steps)


def _with_donor(intervention: Any, live: Checkpoint) -> tuple[Intervention, Checkpoint | None]:
    """The intervention with its donor opened, so that what is recorded of that is what is read."""
    donor = getattr(intervention, "donor", None)
    if donor is None or not dataclasses.is_dataclass(intervention):
        return intervention, None
    opened = open_checkpoint(donor, base=live)
    changed: Any = dataclasses.replace(intervention, donor=opened)  # type: ignore[type-var]
    return changed, opened


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


def _fill(room: Path, found: Ground, store: EditedStore, *, edited: frozenset[str], link: bool) -> None:
    accompany(found.folder, room)
    if found.files is None:
        write_new(store, room)
        return
    if found.index is not None:
        shutil.copyfile(found.index, room / found.index.name)
    rewrite(store, found.files, edited=edited, room=room, link=link)


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
