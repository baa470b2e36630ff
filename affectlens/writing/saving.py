"""Write an edited checkpoint: stream it from the files of its base, without building a model.

base ── base_files ──▶ BaseFiles ─┬─ interventions ──▶ EditedStore ── shards ──▶ weights ┐
                                  └─ copy_companions ──▶ config, tokenizer, code ────────┼─ filled ──▶ folder
interventions, donors ─────────────── provenance ──▶ affectlens.json ────────────────────┘
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
from affectlens.checkpoints.meta_format import MetaStore
from affectlens.checkpoints.pickles.torch_store import PickleStore
from affectlens.checkpoints.quantized import QuantizedStore, unpacked
from affectlens.checkpoints.safetensors import INDEX, SafetensorsStore
from affectlens.checkpoints.tying import VOCABULARY
from affectlens.errors import CheckpointError, LensError
from affectlens.interventions.transplant import Transplant
from affectlens.lens import ActivationIntervention, Intervention
from affectlens.sites import Sites
from affectlens.writing.edited_store import EditedStore
from affectlens.writing.folder import BESIDE, copy_companions, filled
from affectlens.writing.provenance import AppliedIntervention, record, write_record
from affectlens.writing.shards import SINGLE, rewrite, write_new

Written = Intervention | ActivationIntervention  # activations are refused with an explanation
_UNQUANTISED = "Edit the unquantised checkpoint"


def write(
    base: Source,
    interventions: Written | Iterable[Written],
    out: str | Path,
    *,
    link: bool = False,
) -> Checkpoint:
    """Write `base` with weight interventions in it into a new folder, and return that checkpoint.

    Interventions apply in order, each to the values that the last one left, as in `lens.intervene`. The
    folder loads in transformers; its `affectlens.json` says what was done. Files without an edit are copied;
    with `link` they are the base's own files under a second name, and a program that later writes into them
    changes the base too. An adapter over its base is written merged.

    Raises `WriteError` if `out` exists (an empty folder may), is inside the base's folder, or can't be
    written; `CheckpointError` for a base in memory, and for edits of weights that are stored packed;
    `LensError` for an intervention on activations. On error no output is left behind.

    >>> import affectlens as al, tempfile
    >>> base, tuned, *_ = al.load_demo()
    >>> gates = base.sites.where(tower="language", role="gate_proj")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     edited = al.write(base, al.Transplant(gates, donor=tuned), f"{folder}/edited")
    ...     edited.read(gates[0]).equal(tuned.read(gates[0]))
    True
    """
    listed = interventions if isinstance(interventions, Iterable) else [interventions]
    found = base_files(base)
    store, steps = _edited(found.live, [*found.first, *listed])
    edited = frozenset(found.live.at(site).tensor for step in steps for site in step.sites)
    found.refuse(edited)
    with filled(out, apart_from=found.reserved) as room:
        _fill(room, found, store, edited=edited, link=link)
        write_record(record(found.live, steps), room)
        for checkpoint in (found.live, *(step.donor for step in steps if step.donor is not None)):
            checkpoint.store.check()
    return open_checkpoint(out)


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base on this disk, and the checkpoint that they hold."""

    live: Checkpoint
    folder: Path
    first: tuple[Transplant, ...] = ()  # puts an adapter in, before any intervention
    files: Mapping[str, LocalFile] | None = None  # by their new names; None: written anew as safetensors
    index: Path | None = None

    @property
    def reserved(self) -> tuple[Path, ...]:
        """The folder that must not be written to: that of a base, but not that of a single file."""
        return (self.folder,) if os.path.isdir(self.live.store.source) else ()  # noqa: PTH112

    def refuse(self, edited: frozenset[str]) -> None:
        """Raise `CheckpointError` for a tensor whose values can't be replaced in its file."""
        store = self.live.store
        for tensor in sorted(edited):
            if self.files is not None and store.span(tensor) is None:
                raise CheckpointError(
                    store.name,
                    "is stored packed, so new weights can't be written there",
                    key=tensor,
                    fix=_UNQUANTISED,
                )
            if any(name.startswith(f"{tensor} in ") for name in store.skipped):
                # A reader of the other copy would see the old weights.
                fix = "Save the model again with save_pretrained"
                raise CheckpointError(store.name, "is stored in two files", key=tensor, fix=fix)


def base_files(base: Source) -> BaseFiles:
    """Return the files of a base; fetch those of a hub into its cache.

    Raises `CheckpointError` for a base in memory, and for files that can't be written anew.
    """
    opened = open_checkpoint(base)
    first: tuple[Transplant, ...] = ()
    if opened.change is not None:
        first = (Transplant(changed(opened), donor=opened),)
        opened = opened.change.base
    store = opened.store
    if not store.source:
        fix = "Save it with save_pretrained, and give the folder"
        raise CheckpointError(store.name, "is only in memory, so there are no files to copy", fix=fix)
    if not os.path.exists(store.source):  # noqa: PTH110  for any string, where Path.exists raises
        opened = _fetched(opened)
    return _placed(opened, first)


def changed(adapter: Checkpoint) -> Sites:
    """Return the sites of its base that an adapter changes.

    Raises `CheckpointError` if it changes an embedding that base stores as another one.
    """
    assert adapter.change is not None
    base = adapter.change.base
    for site in adapter.factors:
        if site.role in VOCABULARY and base.laid[base.at(site).tensor].place.role != site.role:
            reason = "changes the output embedding alone, which its base ties to the input embedding"
            fix = "Untie them in the base first (tie_word_embeddings)"
            raise CheckpointError(adapter.store.name, reason, key=site.parameter, fix=fix)
    return Sites(site for site in base.sites if adapter.targeted(site))


def _edited(
    live: Checkpoint, interventions: Sequence[object]
) -> tuple[EditedStore, tuple[AppliedIntervention, ...]]:
    """Stack the edits of interventions; raise `LensError` for one that has none."""
    steps, store = [], None
    for one in interventions:
        if not isinstance(one, Intervention):
            raise LensError(f"{type(one).__name__} changes no weights, and a checkpoint holds nothing else")
        intervention, donor = _with_donor(one, live)
        edits = intervention.edits(live)
        if not edits:
            raise LensError(
                f"{type(one).__name__} changes activations here, and a checkpoint holds weights; use sites"
            )
        store = EditedStore(live, edits)
        live = Checkpoint(store)
        steps.append(AppliedIntervention(intervention, Sites(edits), donor))
    if store is None:
        raise LensError("no intervention was given, so there is nothing to write")
    return store, tuple(steps)


def _with_donor(intervention: Any, live: Checkpoint) -> tuple[Intervention, Checkpoint | None]:
    """Open the donor of an intervention once, so that the record names what is read."""
    donor = getattr(intervention, "donor", None)
    if donor is None or not dataclasses.is_dataclass(intervention):
        return intervention, None
    opened = open_checkpoint(donor, base=live)
    changed: Any = dataclasses.replace(intervention, donor=opened)  # type: ignore[type-var]
    return changed, opened


def _fill(room: Path, found: BaseFiles, store: EditedStore, *, edited: frozenset[str], link: bool) -> None:
    copy_companions(found.folder, room)
    if found.files is None:
        write_new(store, room)
        return
    if found.index is not None:
        shutil.copyfile(found.index, room / found.index.name)
    rewrite(store, found.files, edited=edited, room=room, link=link)


def _fetched(opened: Checkpoint) -> Checkpoint:
    """Return a checkpoint of a hub as files in the hub's cache."""
    from affectlens.checkpoints.hub.downloading import fetched

    repository, _, asked = opened.store.source.partition("@")
    commit = str(opened.store.facts.get("revision", "")) or asked
    hub_id = f"{repository}@{commit}" if commit else repository
    folder = fetched(hub_id, re.compile(BESIDE))
    store = open_store(folder, str(folder))
    store.name = opened.store.name
    return Checkpoint(unpacked(store))


def _placed(live: Checkpoint, first: tuple[Transplant, ...]) -> BaseFiles:
    path = Path(live.store.source)
    folder = path if path.is_dir() else path.parent
    raw = live.store.inner if isinstance(live.store, QuantizedStore) else live.store
    if isinstance(raw, SafetensorsStore):
        files = {Path(file.name).name: file for file in raw.files if isinstance(file, LocalFile)}
        index = _index(folder, files)
        if index is None and len(files) == 1:
            # transformers looks for a lone file under this name.
            files = dict(zip([SINGLE], files.values(), strict=True))
        return BaseFiles(live, folder, first, files, index)
    _refuse_new(live)
    return BaseFiles(live, folder, first)


def _refuse_new(live: Checkpoint) -> None:
    """Raise `CheckpointError` if the files hold more than the tensors that can be read from them."""
    store = live.store
    if isinstance(store, QuantizedStore):
        raise CheckpointError(
            store.name, "quantised weights in torch's files can't be written", fix=_UNQUANTISED
        )
    if isinstance(store, MetaStore):
        fix = "Convert it first, as by convert_llama_weights_to_hf.py of transformers"
        raise CheckpointError(store.name, "is in Meta's format, which can't be written", fix=fix)
    if not isinstance(store, PickleStore):
        fix = "Merge it with PEFT first"
        raise CheckpointError(store.name, "a model and its adapter in one file can't be written", fix=fix)
    for tensor, (why, _) in store.skipped.items():
        raise CheckpointError(store.name, f"can't be read, so it can't be written: {why}", key=tensor)


def _index(folder: Path, files: Mapping[str, LocalFile]) -> Path | None:
    """Return the index in a folder if it lists exactly these files."""
    path = folder / INDEX
    if not os.path.lexists(path):
        return None
    listed = weight_map(read_json(path), str(path), suffixes=(".safetensors",))
    # An index of other files would send a reader to shards that are not copied.
    return path if set(listed.values()) == set(files) else None
