"""The headline call: how far every parameter of a tuned checkpoint lies from its base."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
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
    rows, identical = [], set()
    with tqdm(
        total=total, unit="param", unit_scale=True, disable=None if progress else True, leave=False
    ) as bar:
        for site, row, equal in _rows(pairing, beside):
            rows.append(row)
            if equal:
                identical.add(site)
            bar.update(row["size"])
    frame = pd.DataFrame(rows)
    for name in ("layer", "expert"):
        frame[name] = frame[name].astype("Int64")
    return Drift(frame, _origin(pairing, beside, frame, frozenset(identical)))


def _rows(pairing: Pairing, control: Checkpoint | None) -> Iterator[tuple[Site, dict[str, Any], bool]]:
    for site in pairing.comparable:
        b, t = pairing.base.read(site), pairing.tuned.read(site)
        c = None
        if control is not None and site in control.storage and control.shape(site) == tuple(b.shape):
            c = control.read(site)
        dtypes = dict.fromkeys((pairing.base.dtype(site), pairing.tuned.dtype(site)))
        row = {
            "parameter": site.parameter,
            **{name: getattr(site, name) for name in _SITE},
            "size": b.numel(),
            "dtype": " → ".join(dtypes),
            **measure(b, t, control=c),
            "targeted": True,  # a whole checkpoint could have moved anywhere; an adapter could not
        }
        yield site, row, same_bits(b, t)


def _origin(
    pairing: Pairing, control: Checkpoint | None, frame: pd.DataFrame, identical: frozenset[Site]
) -> dict[str, Any]:
    sources = {"base": pairing.base.identity, "tuned": pairing.tuned.identity}
    if control is not None:
        sources["control"] = control.identity
    return {
        "sources": sources,
        **provenance(),
        "ledger": pairing.ledger(identical),
        "findings": list(_findings(frame)),
    }


def _findings(frame: pd.DataFrame) -> Iterator[str]:
    language = frame[frame["tower"] == "language"]
    if len(language) and not language["frobenius"].any():
        yield "The language model did not move at all: its drift is exactly zero."
    if unrelated(frame):
        yield "This is probably not the base: no weight matrix of tuned resembles its partner (cosine ≈ 0)."
    if count := int(frame["nonfinite"].sum()):
        yield f"{count:,} values are NaN or infinite and were left out of every other measure."


def unrelated(frame: pd.DataFrame) -> bool:
    """Whether the two look like strangers: matrices as far apart as independent draws are.

    Independent weights of one scale give a relative drift of √2 and a cosine of 0.
    """
    big = frame[(frame["param"] == "weight") & (frame["role"] != "norm") & (frame["size"] >= 256)]
    if big.empty:
        return False
    return bool(big["cosine"].abs().median() < 0.1 and big["relative"].median() > 0.9)


def refuse_unrelated(drift: Drift) -> Drift:
    """Return the drift of a kindred pair; raise `NothingToCompare` for strangers of one shape."""
    if unrelated(drift.frame):
        names = [source["name"] for source in drift.origin["sources"].values()]
        raise NothingToCompare(
            f"{names[0]} is probably not the base of {names[1]}: their weights are unrelated (cosine ≈ 0)"
        )
    return drift
