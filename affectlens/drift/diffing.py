"""The headline call: how far every parameter of a tuned checkpoint lies from its base."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from affectlens.checkpoints import Checkpoint, Pairing, Source, open_checkpoint, pair
from affectlens.drift.drift import Drift
from affectlens.drift.measuring import measure, same_bits
from affectlens.errors import NothingToCompare
from affectlens.sites import Site
from affectlens.table import provenance

_SITE = ("tower", "stack", "layer", "role", "expert", "param", "label")


def diff(base: Source, tuned: Source, *, control: Source | None = None, progress: bool = True) -> Drift:
    """Measure the drift of every site from `base` to `tuned`.

    Each side is a path, a hub id, an open `Checkpoint` or a live `nn.Module`; no model is built.
    `control` is another tuning of the same base, on something that is not affect: its drift and the
    cosine of the two changes stand beside each site's. Raises `CheckpointError` for what can't be
    read and `NothingToCompare` when the two share no weight matrix.
    """
    pairing = pair(open_checkpoint(base), open_checkpoint(tuned))
    beside = None if control is None else open_checkpoint(control)
    if beside is not None:
        pair(pairing.base, beside)
    sites = pairing.comparable
    total = sum(pairing.base.storage[site].size for site in sites)
    rows, states = [], {}
    with tqdm(
        total=total, unit="param", unit_scale=True, disable=None if progress else True, leave=False
    ) as bar:
        for site, row, state in _rows(pairing, beside):
            rows.append(row)
            states[site] = state
            bar.update(row["size"])
    frame = pd.DataFrame(rows)
    for name in ("layer", "expert"):
        frame[name] = frame[name].astype("Int64")
    return Drift(frame, _origin(pairing, beside, frame, states))


def _only_rounded(base: Tensor, tuned: Tensor) -> bool:
    """Whether one side is the other saved in another dtype."""
    if base.dtype == tuned.dtype:
        return False
    return same_bits(base.to(tuned.dtype), tuned) or same_bits(base, tuned.to(base.dtype))


def _rows(pairing: Pairing, control: Checkpoint | None) -> Iterator[tuple[Site, dict[str, Any], str]]:
    for site in pairing.comparable:
        b, t = pairing.base.read(site).cpu(), pairing.tuned.read(site).cpu()
        c = None
        if control is not None and site in control.storage and control.shape(site) == tuple(b.shape):
            c = control.read(site).cpu()
        dtypes = dict.fromkeys((pairing.base.dtype(site), pairing.tuned.dtype(site)))
        row = {
            "parameter": site.parameter,
            **{name: getattr(site, name) for name in _SITE},
            "size": b.numel(),
            "dtype": " → ".join(dtypes),
            **measure(b, t, control=c),
            "targeted": True,  # a whole checkpoint could have moved anywhere; an adapter could not
        }
        still = same_bits(b, t) or not (row["changed"] or row["nonfinite"])
        yield site, row, "identical" if still else "rounded" if _only_rounded(b, t) else "moved"


def _origin(
    pairing: Pairing, control: Checkpoint | None, frame: pd.DataFrame, states: dict[Site, str]
) -> dict[str, Any]:
    identical = frozenset(site for site, state in states.items() if state == "identical")
    rounded = sum(state == "rounded" for state in states.values())
    sources = {"base": pairing.base.identity, "tuned": pairing.tuned.identity}
    if control is not None:
        sources["control"] = control.identity
    return {
        "sources": sources,
        **provenance(),
        "ledger": pairing.ledger(identical),
        "findings": [*_findings(frame, moved=len(states) - len(identical), rounded=rounded), *pairing.unlike],
    }


def _findings(frame: pd.DataFrame, *, moved: int, rounded: int) -> Iterator[str]:
    language = frame[frame["tower"] == "language"]
    if len(language) and not language["changed"].any() and not language["nonfinite"].any():
        yield "The language model did not move at all: its drift is exactly zero."
    if rounded:
        yield f"{rounded} of {moved} parameters that moved did so by rounding to another dtype alone."
    if unrelated(frame):
        yield "This is probably not the base: no weight matrix of tuned resembles its partner (cosine ≈ 0)."
    if "control_frobenius" in frame:
        yield from _control_findings(frame)
    if count := int(frame["nonfinite"].sum()):
        yield f"{count:,} values are NaN or infinite and were left out of every other measure."


def _control_findings(frame: pd.DataFrame) -> Iterator[str]:
    moved = frame[(frame["frobenius"] > 0) | (frame["control_frobenius"] > 0)]
    if control_unrelated(frame):
        yield "This is probably no tuning of the same base: the control's weights are unrelated to it."
    elif not moved["control_frobenius"].any():
        yield "The control equals base in every value, so it controls nothing."
    elif len(moved) and (moved["control_cosine"] > 1 - 1e-9).all():
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
