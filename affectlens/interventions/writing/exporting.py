"""An adapter, or a file of trainables, in the form that PEFT loads: a folder, or a whole merged model.

    .pth of trainables ┐                ┌─▶ adapter_model.safetensors + adapter_config.json   export
    a PEFT adapter     ┴─ over a base ──┴─▶ the base with the adapter's sites put in          merge

A file of trainables says neither alpha nor, in words that PEFT reads, which modules are meant. Both are
written out here, exactly: each module by its whole name.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint, pair
from affectlens.checkpoints.folders import ADAPTER
from affectlens.interventions.transplant import Transplant
from affectlens.interventions.writing.filling import filled
from affectlens.interventions.writing.grounding import changed
from affectlens.interventions.writing.peft import adapter_parts
from affectlens.interventions.writing.recording import write_record
from affectlens.interventions.writing.saving import write
from affectlens.interventions.writing.sharding import write_new
from affectlens.table import versions

FORMAT = "affectlens.exported/1"
_WEIGHTS = "adapter_model.safetensors"


def export(
    source: str | Path,
    base: Source,
    *,
    out: str | Path,
    preset: str | None = None,
    alpha: float | None = None,
) -> Mapping[str, Any]:
    """Write an adapter as a new PEFT folder, and return what was done: `left_out` says what PEFT can't take.

    `preset` and `alpha` are those of `open_checkpoint`. Raises `CheckpointError` where there are no factors,
    or alpha is known to nobody, and `WriteError`.
    """
    before = open_checkpoint(base)
    adapter = open_checkpoint(source, base=before, preset=preset, alpha=alpha)
    parts = adapter_parts(adapter, before)
    named = str(base) if isinstance(base, str | Path) else before.store.source
    found = {
        "format": FORMAT,
        "base": before.identity,
        "source": adapter.identity,
        "adapter": {
            "modules": len(parts.ranks),
            "parameters": sum(prod(header.shape) for header in parts.weights.headers.values()),
            "saved_whole": len(parts.saved),
        },
        "left_out": dict(parts.left_out),
        "versions": dict(versions()),
    }
    with filled(out) as room:
        write_new(parts.weights, room, single=_WEIGHTS)
        text = json.dumps(parts.config(base=named), indent=2, allow_nan=False)
        (room / ADAPTER).write_text(text, "utf-8")
        write_record(found, room)
        for side in (before, adapter):
            side.store.check()
    return found


def merge(
    source: str | Path,
    base: Source,
    *,
    out: str | Path,
    preset: str | None = None,
    alpha: float | None = None,
    link: bool = False,
) -> Checkpoint:
    """Write the base with all that an adapter, or a file of trainables, changes of it; as `write` does."""
    before = open_checkpoint(base)
    donor = open_checkpoint(source, base=before, preset=preset, alpha=alpha)
    if donor.change is not None:
        sites = changed(donor)
    else:
        donor = pair(before, donor).tuned
        sites = before.sites & donor.sites
    return write(before, Transplant(sites, donor=donor), out, link=link)
