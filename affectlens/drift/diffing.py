"""The headline call: how far every parameter of a tuned checkpoint lies from its base."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from tqdm import tqdm

from affectlens.checkpoints import Checkpoint, Pairing, Source, open_checkpoint, pair
from affectlens.drift.drift import Drift
from affectlens.drift.finding import findings
from affectlens.drift.planning import Detail, Strip, strips
from affectlens.drift.spectral import spectral
from affectlens.drift.spreading import jobs, spread
from affectlens.drift.streaming import Show, engine, stream
from affectlens.drift.summing import Measure, Summing
from affectlens.drift.sums import Sums
from affectlens.drift.symmetric import symmetric
from affectlens.drift.tabulating import RESERVED, frame
from affectlens.errors import TableError
from affectlens.sites import Site
from affectlens.table import provenance


def diff(
    base: Source,
    tuned: Source,
    *,
    control: Source | None = None,
    preset: str | None = None,
    alpha: float | None = None,
    detail: str | Iterable[str] | None = None,
    spectra: int | None = None,
    align: bool = False,
    measures: Mapping[str, Measure] | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Drift:
    """Measure the drift of every site from `base` to `tuned`.

    Each side is a path, a hub id, an open `Checkpoint` or a live `nn.Module`; no model is built. An
    adapter or a file of bare trainables is read over `base`; `preset` or `alpha` says LoRA's alpha where
    no file does. `control` is another tuning of the same base, on something that is not affect: its
    drift, its angle to the change and the part of the change along it stand beside each site's.

    `detail` asks for `"heads"`, `"neurons"` (see `Drift.neurons`) or `"exact"` (nothing taken from factors
    or content hashes), or several with commas. `spectra=k` adds the top k singular values of each changed
    matrix and what follows from them; `align=True` matches the neurons of each gated MLP first and puts
    the drift after it beside. `measures` maps names to functions of two float32 blocks, base and tuned,
    whose values are added up. `executor` takes anything with `submit`, to which shards are given.

    Raises `CheckpointError` for what can't be read and `NothingToCompare` when the two share no matrix.
    """
    custom = _named(measures)
    wanted = Detail.of(detail, exact=bool(custom))  # factors tell a function of blocks nothing
    if spectra is not None and (type(spectra) is not int or spectra < 1):
        raise TableError(f"spectra={spectra!r} singular values asked for: take a whole number, 1 or more")
    before = open_checkpoint(base, preset=preset, alpha=alpha)
    pairing = pair(before, open_checkpoint(tuned, base=before, preset=preset, alpha=alpha))
    beside = None if control is None else open_checkpoint(control, base=before, preset=preset, alpha=alpha)
    if beside is not None:
        beside = pair(before, beside).tuned  # a part of a model is read beside base
    sides = (before, pairing.tuned, *([beside] if beside else []))
    plan = list(strips(pairing, beside, detail=wanted))
    with _bar(plan, progress) as bar:
        if executor is None:
            found = stream(plan, Summing(engine(), custom), tell=bar.update)
        else:
            work = jobs(plan, sides, alpha=alpha, preset=preset, detail=detail, custom=custom)
            found = spread(plan, work, executor=executor, tell=bar.update)
    told = [
        f"No {kind}s are known: neither the config nor the shapes say how many there are."
        for kind in sorted(wanted.units)
        if not any(strip.units is not None and strip.units.kind == kind for strip in plan)
    ]
    columns = [symmetric(pairing, tell=told.append, show=_each(progress))] if align else []
    if spectra:
        columns.append(spectral(found, spectra, detail=wanted, tell=told.append, show=_each(progress)))
    for side in sides:
        side.store.check()
    rows = frame(found, pairing, beside=_joined(columns))
    origin = _origin(pairing, beside, rows, found, told)
    return Drift(rows, {**origin, "custom": sorted(custom)} if custom else origin)


def _bar(plan: list[Strip], progress: bool) -> Any:
    total = sum(strip.bytes for strip in plan)
    return tqdm(total=total, unit="B", unit_scale=True, disable=not (progress and _watched()), leave=False)


def _each(progress: bool) -> Show:
    hidden = not (progress and _watched())
    return lambda every, what: tqdm(every, unit=f" {what}", disable=hidden, leave=False)


def _watched() -> bool:
    """Whether somebody looks: a terminal, or a notebook; a log has no use for a bar."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _named(measures: Mapping[str, Measure] | None) -> dict[str, Measure]:
    for name in measures or {}:
        if name in RESERVED:
            raise TableError(f"a measure can't be called {name!r}: the table has a column of that name")
    return dict(measures or {})


def _joined(columns: list[dict[Site, dict[str, Any]]]) -> dict[Site, dict[str, Any]]:
    sites = {site for part in columns for site in part}
    return {site: {k: v for part in columns for k, v in part.get(site, {}).items()} for site in sites}


def _origin(
    pairing: Pairing,
    control: Checkpoint | None,
    rows: pd.DataFrame,
    found: dict[Strip, Sums],
    told: list[str],
) -> dict[str, Any]:
    identical = frozenset(strip.site for strip, sums in found.items() if sums.identical)
    sides = {"base": pairing.base, "tuned": pairing.tuned, **({"control": control} if control else {})}
    remarks: dict[str, list[str]] = {}
    for name, side in sides.items():
        for remark in (*side.remarks, *side.store.notes):
            remarks.setdefault(remark, []).append(name)
    notes = [f"{' and '.join(names)}: {remark}" for remark, names in remarks.items()]
    return {
        "sources": {name: side.identity for name, side in sides.items()},
        **provenance(),
        "ledger": pairing.ledger(identical),
        "findings": [*findings(rows, found.values()), *told, *notes, *pairing.unlike],
    }
