"""`diff`: measure how far every parameter of a tuned checkpoint is from its base, and report findings."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from affectlens.checkpoints import Checkpoint, Pairing, Source, open_checkpoint, pair
from affectlens.drift.blocks import Summing
from affectlens.drift.drift import Drift
from affectlens.drift.measures import BLOCKWISE, RESERVED, Measure, Sums, frame
from affectlens.drift.parts import Detail, Strip, strips
from affectlens.drift.stillness import stillness
from affectlens.drift.streaming import Show, engine, jobs, spread, stream
from affectlens.drift.whole_matrices import spectral, symmetric
from affectlens.errors import NothingToCompare, TableError
from affectlens.progress import each, shown
from affectlens.sites import Site
from affectlens.table import provenance

_DELTA = (
    "Tuned looks like a delta, the difference from its base that was published in its place: its norms are "
    "near zero. Add it to its base first, as by `python -m fastchat.model.apply_delta`."
)


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
    adapter or a file of bare trainables is read over `base`; `preset` or `alpha` gives LoRA's alpha where
    no file does. `control` is another tuning of the same base, on something other than affect: it adds
    columns with its own drift, its angle to the change and the part of the change along it.

    `detail` asks for `"heads"`, `"neurons"` (see `Drift.neurons`) or `"exact"` (read every value, use no
    factors or content hashes), or several with commas. `spectra=k` adds the top k singular values of each
    changed matrix and the ranks that follow from them; `align=True` adds the drift after the neurons of
    each gated MLP are matched. `measures` maps names to functions of two float32 blocks, base and tuned,
    whose values are added up. `executor`, anything with `submit`, measures each shard as one job.

    Raises `CheckpointError` for unreadable files, `NothingToCompare` for sides that share no matrix.

    >>> import affectlens as al
    >>> base, tuned, control, _ = al.load_demo()
    >>> drift = al.diff(base, tuned, control=control, progress=False)
    >>> drift.by("role")[["role", "sites", "targeted", "relative", "control_cosine"]].round(2).head(2)
            role  sites  targeted  relative  control_cosine
    0  gate_proj      4         4      0.58            0.03
    1  down_proj      4         4      0.58            0.04
    """
    custom = _named(measures)
    wanted = Detail.of(detail, exact=bool(custom))  # a function of blocks needs the values, not factors
    _check_spectra(spectra)
    before = open_checkpoint(base, preset=preset, alpha=alpha)
    pairing = pair(before, open_checkpoint(tuned, base=before, preset=preset, alpha=alpha))
    beside = None if control is None else _paired(before, control, preset=preset, alpha=alpha)
    sides = (before, pairing.tuned, *([beside] if beside else []))
    plan = list(strips(pairing, beside, detail=wanted))
    with shown(sum(strip.bytes for strip in plan), unit="B", what="diff", show=progress) as step:
        if executor is None:
            found = stream(plan, Summing(engine(), custom), tell=step)
        else:
            work = jobs(plan, sides, alpha=alpha, preset=preset, detail=detail, custom=custom)
            found = spread(plan, work, executor=executor, tell=step)
    told = list(_unmeasured(plan, wanted))
    columns = [symmetric(pairing, tell=told.append, show=_each(progress))] if align else []
    if spectra:
        columns.append(spectral(found, spectra, detail=wanted, tell=told.append, show=_each(progress)))
    for side in sides:
        side.store.check()
    rows = frame(found, pairing, beside=_joined(columns))
    origin = _origin(pairing, beside, rows, found, told)
    return Drift(rows, {**origin, "custom": sorted(custom)} if custom else origin)


def _check_spectra(k: int | None) -> None:
    if k is not None and (type(k) is not int or k < 1):
        raise TableError(f"spectra must be a whole number, 1 or more, got {k!r}")


def _paired(base: Checkpoint, control: Source, *, preset: str | None, alpha: float | None) -> Checkpoint:
    # Not only opened: a control that is a part of a model gets its names from the pairing.
    return pair(base, open_checkpoint(control, base=base, preset=preset, alpha=alpha)).tuned


def _unmeasured(plan: list[Strip], wanted: Detail) -> Iterator[str]:
    for kind in sorted(wanted.units):
        if not any(strip.units is not None and strip.units.kind == kind for strip in plan):
            yield f"No {kind}s were measured: neither the config nor the shapes give their number."


def _each(progress: bool) -> Show:
    return lambda every, unit: each(every, total=len(every), unit=unit, what="diff", show=progress)


def _named(measures: Mapping[str, Measure] | None) -> dict[str, Measure]:
    for name in measures or {}:
        if name in RESERVED:
            raise TableError(f"a measure can't be called {name!r}: the table has a column of that name")
    return {**BLOCKWISE, **(measures or {})}


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
        "findings": [
            *stillness(pairing, rows),
            *findings(rows, found.values()),
            *(("Rows of the embeddings were matched by token.",) if pairing.matched else ()),
            *told,
            *notes,
            *pairing.unlike,
        ],
    }


def findings(frame: pd.DataFrame, found: Collection[Sums]) -> Iterator[str]:
    """Yield sentences on what a reader must not overlook, given the rows and the sums behind them."""
    moved = sum(not sums.identical for sums in found)
    rounded = sum(sums.rounds and not sums.identical for sums in found)
    if not all(sums.scaled for sums in found):
        yield (
            "No file gives LoRA's alpha, so the drift is known only up to the factor alpha/r: ratios "
            "between modules are right, sizes are not. Give alpha= or preset=."
        )
    if unread := sum(not sums.read for sums in found):
        yield (
            f"{unread} parameters are in files of equal content on both sides: they did not move and were "
            "not read, so their norms are unknown (detail='exact' reads them)."
        )
    if rounded:
        yield f"{rounded} of {moved} parameters that moved changed only by rounding to another dtype."
    if is_delta(frame):
        yield _DELTA
    elif unrelated(frame):
        yield "This is probably not the base: the weights of tuned are unrelated to it (cosine ≈ 0)."
    yield from _zeros(frame)
    yield from _casting(frame)
    if "control_frobenius" in frame:
        yield from _control(frame)
    if count := int(frame["nonfinite"].sum()):
        yield f"{count:,} values are NaN or infinite and are left out of every other measure."


def _zeros(frame: pd.DataFrame) -> Iterator[str]:
    """Report weights that are all zeros on one side: never saved, or lost on the way."""
    weights = frame[(frame["frobenius"] > 0) & (frame["param"] == "weight") & (frame["role"] != "norm")]
    for side in ("base", "tuned"):
        zero = weights[weights[f"{side}_norm"] == 0]
        if len(zero):
            first = f"first: {zero['parameter'].iloc[0]}"
            yield f"{len(zero)} weights of {side} are all zeros, unlike on the other side ({first})."


def _casting(frame: pd.DataFrame) -> Iterator[str]:
    """Report weights whose drift is no larger than the error of saving them in their dtype."""
    moved = frame[(frame["frobenius"] > 0) & (frame["param"] == "weight") & frame["rounding"].notna()]
    within = moved[moved["rounding"] >= moved["frobenius"]]
    if len(within):
        yield (
            f"{len(within)} of {len(moved)} weights that moved moved no further than rounding to their dtype "
            f"explains (first: {within['parameter'].iloc[0]})."
        )


def _control(frame: pd.DataFrame) -> Iterator[str]:
    if lacking := int(frame["control_along"].isna().sum()):
        yield f"The control lacks {lacking} of the {len(frame)} compared parameters: they have no control."
    if lost := int(frame["control_nonfinite"].sum()):
        yield f"{lost:,} values of the control are NaN or infinite and are left out of its measures."
    moved = frame[(frame["frobenius"] > 0) | (frame["control_frobenius"] > 0)]
    if control_unrelated(frame):
        yield "The control is probably not a tuning of the same base: its weights are unrelated to it."
    elif not moved["control_frobenius"].any():
        yield "The control equals base in every value, so it can't serve as a control."
    elif len(moved) and (moved["control_cosine"] > 1 - 1e-6).all():
        yield "The control changed in the same direction as tuned at every site: is it the same tuning?"


def control_unrelated(frame: pd.DataFrame) -> bool:
    """Return whether the control is unrelated to base: as far from it as independent weights are."""
    if "control_relative" not in frame:
        return False
    known = _matrices(frame)["control_relative"].dropna()
    return bool(len(known)) and bool(known.median() > 1.2)


def unrelated(frame: pd.DataFrame) -> bool:
    """Return whether tuned is unrelated to base: matrices as far apart as independent draws are.

    Independent weights of one scale give a relative drift of √2 and a cosine of 0.
    """
    big = _matrices(frame)
    if big.empty:
        return False
    return bool(big["cosine"].abs().median() < 0.1 and big["relative"].median() > 0.9)


def is_delta(frame: pd.DataFrame) -> bool:
    """Return whether tuned holds differences from base in place of weights: its norms shrank to nothing."""
    norms = frame[(frame["role"] == "norm") & (frame["param"] == "weight") & (frame["base_norm"] > 0)]
    shrunk = norms["tuned_norm"] < 0.5 * norms["base_norm"]
    return unrelated(frame) and bool(len(norms)) and bool(shrunk.mean() > 0.5)


def _matrices(frame: pd.DataFrame) -> pd.DataFrame:
    # Norms start from ones in every model, so those of unrelated models resemble each other.
    return frame[(frame["param"] == "weight") & (frame["role"] != "norm") & (frame["size"] >= 256)]


def refuse_unrelated(drift: Drift) -> Drift:
    """Return the drift of related models; raise `NothingToCompare` for unrelated ones of one shape."""
    if is_delta(drift.frame):
        raise NothingToCompare(_DELTA)
    if unrelated(drift.frame):
        names = [source["name"] for source in drift.origin["sources"].values()]
        raise NothingToCompare(
            f"{names[0]} is probably not the base of {names[1]}: their weights are unrelated (cosine ≈ 0)"
        )
    if control_unrelated(drift.frame):
        raise NothingToCompare(
            "the control is probably not a tuning of this base: their weights are unrelated"
        )
    return drift
