"""Write an edited checkpoint: streamed from the files of its base, without building a model.

base ── grounding ──▶ Ground ─┬─ edited ──▶ EditedStore ── sharding ──▶ weights ┐
                              └─ accompanying ──▶ config, tokenizer, code ──────┼─ filling ──▶ a folder
interventions ── edits ───────── recording ──▶ affectlens.json ────────────────┘
"""

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.errors import LensError
from affectlens.interventions.writing.accompanying import accompany
from affectlens.interventions.writing.edited import EditedStore
from affectlens.interventions.writing.filling import filled
from affectlens.interventions.writing.grounding import Ground, ground
from affectlens.interventions.writing.recording import Step, record, write_record
from affectlens.interventions.writing.sharding import rewrite, write_new
from affectlens.lens import ActivationIntervention, Intervention
from affectlens.sites import Sites

Written = Intervention | ActivationIntervention  # the latter to be refused in words


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
    found.refuse(store.edited)
    with filled(out, apart_from=found.reserved) as room:
        _fill(room, found, store, link=link)
        write_record(record(found.live, steps), room)
        for checkpoint in (found.live, *(step.donor for step in steps if step.donor is not None)):
            checkpoint.store.check()
    return open_checkpoint(out)


def _edited(live: Checkpoint, interventions: Sequence[object]) -> tuple[EditedStore, tuple[Step, ...]]:
    """Lay the edits of interventions over one another; raises what an intervention raises."""
    steps = []
    for one in interventions:
        if not isinstance(one, Intervention):
            raise LensError(
                f"{type(one).__name__} changes no weights, and weights are what a checkpoint holds"
            )
        intervention, donor = _with_donor(one, live)
        edits = intervention.edits(live)
        if not edits:
            raise LensError(f"{type(one).__name__} changes activations here, and a checkpoint holds weights")
        live = Checkpoint(EditedStore(live, edits))
        steps.append(Step(intervention, Sites(edits), donor))
    store = live.store
    if not isinstance(store, EditedStore):
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


def _fill(room: Path, found: Ground, store: EditedStore, *, link: bool) -> None:
    accompany(found.folder, room)
    if found.files is None:
        write_new(store, room)
        return
    if found.index is not None:
        shutil.copyfile(found.index, room / found.index.name)
    rewrite(store, found.files, room=room, link=link)
