"""The headline call: how far every parameter of a tuned checkpoint lies from its base."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
from tqdm import tqdm

from affectlens.checkpoints import Checkpoint, Pairing, Source, open_checkpoint, pair
from affectlens.drift.blocks import Measure, Summing
from affectlens.drift.drift import Drift
from affectlens.drift.measures import RESERVED, Sums, frame
from affectlens.drift.parts import Detail, Strip, strips
from affectlens.drift.streaming import Show, engine, jobs, spread, stream
from affectlens.drift.whole_matrices import spectral, symmetric
from affectlens.errors import NothingToCompare, TableError
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


def findings(frame: pd.DataFrame, found: Collection[Sums]) -> Iterator[str]:
    """Sentences on what must not be overlooked, given the rows and the sums they were made of."""
    moved = sum(not sums.identical for sums in found)
    rounded = sum(sums.rounds and not sums.identical for sums in found)
    if not all(sums.scaled for sums in found):
        yield (
            "No file says LoRA's alpha, so the drift is known up to one common factor, alpha/r: ratios "
            "between modules hold, sizes do not. Give alpha= or preset=."
        )
    if unread := sum(not sums.read for sums in found):
        yield (
            f"{unread} parameters lie in files of equal content on both sides: they did not move, and were "
            "not read, so their norms are not known (detail='exact' reads them)."
        )
    language = frame[(frame["tower"] == "language") & frame["frobenius"].notna()]
    reached = language[language["targeted"]]
    if len(language) and reached.empty:
        yield "The adapter holds nothing of the language model, which so could not move."
    elif len(reached) and not _moved(reached):
        yield "The language model did not move at all: its drift is exactly zero."
    if rounded:
        yield f"{rounded} of {moved} parameters that moved did so by rounding to another dtype alone."
    if unrelated(frame):
        yield "This is probably not the base: no weight matrix of tuned resembles its partner (cosine ≈ 0)."
    yield from _zeros(frame)
    yield from _casting(frame)
    if "control_frobenius" in frame:
        yield from _control(frame)
    if count := int(frame["nonfinite"].sum()):
        yield f"{count:,} values are NaN or infinite and were left out of every other measure."


def _moved(frame: pd.DataFrame) -> bool:
    columns = frame[["frobenius", "changed", "nonfinite"]].fillna(0)
    return bool(columns.to_numpy(float).any())


def _zeros(frame: pd.DataFrame) -> Iterator[str]:
    """Where a side has nothing but zeros: weights that were never saved, or lost on the way."""
    weights = frame[(frame["frobenius"] > 0) & (frame["param"] == "weight") & (frame["role"] != "norm")]
    for side in ("base", "tuned"):
        zero = weights[weights[f"{side}_norm"] == 0]
        if len(zero):
            first = f"first: {zero['parameter'].iloc[0]}"
            yield f"{len(zero)} weights of {side} are zero in every value, unlike their partners ({first})."


def _casting(frame: pd.DataFrame) -> Iterator[str]:
    """Where the drift is no larger than what saving the tuned weights in their dtype makes by itself."""
    moved = frame[(frame["frobenius"] > 0) & (frame["param"] == "weight") & frame["rounding"].notna()]
    within = moved[moved["rounding"] >= moved["frobenius"]]
    if len(within):
        yield (
            f"{len(within)} of {len(moved)} weights that moved did so by no more than rounding to their "
            f"dtype can account for (first: {within['parameter'].iloc[0]})."
        )


def _control(frame: pd.DataFrame) -> Iterator[str]:
    if lacking := int(frame["control_along"].isna().sum()):
        yield f"The control lacks {lacking} of the {len(frame)} compared parameters: it says nothing of them."
    if lost := int(frame["control_nonfinite"].sum()):
        yield f"{lost:,} values of the control are NaN or infinite and were left out of its measures."
    moved = frame[(frame["frobenius"] > 0) | (frame["control_frobenius"] > 0)]
    if control_unrelated(frame):
        yield "This is probably no tuning of the same base: the control's weights are unrelated to it."
    elif not moved["control_frobenius"].any():
        yield "The control equals base in every value, so it controls nothing."
    elif len(moved) and (moved["control_cosine"] > 1 - 1e-6).all():
        yield "The control's change has the direction of tuned's at every site: is it the same tuning?"


def control_unrelated(frame: pd.DataFrame) -> bool:
    """Whether the control is a stranger to base: as far from it as independent weights are."""
    if "control_relative" not in frame:
        return False
    known = _matrices(frame)["control_relative"].dropna()
    return bool(len(known)) and bool(known.median() > 1.2)


def unrelated(frame: pd.DataFrame) -> bool:
    """Whether the two look like strangers: matrices as far apart as independent draws are.

    Independent weights of one scale give a relative drift of √2 and a cosine of 0.
    """
    big = _matrices(frame)
    if big.empty:
        return False
    return bool(big["cosine"].abs().median() < 0.1 and big["relative"].median() > 0.9)


def _matrices(frame: pd.DataFrame) -> pd.DataFrame:
    # Norms start from ones in every model, and so resemble each other between strangers.
    return frame[(frame["param"] == "weight") & (frame["role"] != "norm") & (frame["size"] >= 256)]


def refuse_unrelated(drift: Drift) -> Drift:
    """Return the drift of a kindred pair; raise `NothingToCompare` for strangers of one shape."""
    if unrelated(drift.frame):
        names = [source["name"] for source in drift.origin["sources"].values()]
        raise NothingToCompare(
            f"{names[0]} is probably not the base of {names[1]}: their weights are unrelated (cosine ≈ 0)"
        )
    if control_unrelated(drift.frame):
        raise NothingToCompare("the control is probably no tuning of this base: their weights are unrelated")
    return drift
