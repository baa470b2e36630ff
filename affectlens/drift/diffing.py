"""The headline call: how far every parameter of a tuned checkpoint lies from its base."""

from typing import Any

import pandas as pd
from tqdm import tqdm

from affectlens.checkpoints import Checkpoint, Pairing, Source, open_checkpoint, pair
from affectlens.drift.drift import Drift
from affectlens.drift.finding import findings
from affectlens.drift.planning import Strip, strips
from affectlens.drift.streaming import engine, stream
from affectlens.drift.summing import Summing
from affectlens.drift.sums import Sums, measures
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
    plan = list(strips(pairing, beside, detail=None))
    with tqdm(
        total=sum(strip.bytes for strip in plan),
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
        leave=False,
    ) as bar:
        found = stream(plan, Summing(engine()), tell=bar.update)
    for side in (pairing.base, pairing.tuned, *([beside] if beside else [])):
        side.store.check()
    frame = pd.DataFrame([_row(strip, sums) for strip, sums in found.items()])
    for name in ("layer", "expert"):
        frame[name] = frame[name].astype("Int64")
    return Drift(frame, _origin(pairing, beside, frame, found))


def _row(strip: Strip, sums: Sums) -> dict[str, Any]:
    site, dtypes = strip.site, [side.dtype(strip.site) for side in strip.sides[:2]]
    return {
        "parameter": site.parameter,
        **{name: getattr(site, name) for name in _SITE},
        "size": strip.size,
        "dtype": " → ".join(dict.fromkeys(dtypes)),
        **measures(sums, dtype=dtypes[1]),
        "targeted": True,  # a whole checkpoint could have moved anywhere; an adapter could not
    }


def _origin(
    pairing: Pairing, control: Checkpoint | None, frame: pd.DataFrame, found: dict[Strip, Sums]
) -> dict[str, Any]:
    identical = frozenset(strip.site for strip, sums in found.items() if sums.identical)
    rounded = sum(sums.rounds and not sums.identical for sums in found.values())
    sources = {"base": pairing.base.identity, "tuned": pairing.tuned.identity}
    if control is not None:
        sources["control"] = control.identity
    moved = len(found) - len(identical)
    return {
        "sources": sources,
        **provenance(),
        "ledger": pairing.ledger(identical),
        "findings": [*findings(frame, moved=moved, rounded=rounded), *pairing.unlike],
    }
