"""Drift after the symmetries of gated MLPs are undone, beside the drift before.

A neuron may change its place, and trade scale between up and down, without any change of what the model
computes. Where a pair is an ordinary fine-tune nothing is found, and the two drifts are the same.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from affectlens.checkpoints import Pairing
from affectlens.drift.aligning import Alignment, Mlp, align, aligned
from affectlens.drift.streaming import Show
from affectlens.sites import Site

_ROLES = ("gate_proj", "up_proj", "down_proj")
_LOUD = 0.9  # of the drift that is left; below it the difference changes what a table says


def symmetric(pairing: Pairing, *, tell: Callable[[str], Any], show: Show) -> dict[Site, dict[str, Any]]:
    """`aligned_frobenius` and `aligned_relative` of gate, up and down of each gated MLP."""
    rows: dict[Site, dict[str, Any]] = {}
    strangers = loud = count = 0
    for sites in show(_mlps(pairing), "MLP"):
        count += 1
        base, tuned = (
            Mlp(*(side.read(site).cpu().float() for site in sites)) for side in (pairing.base, pairing.tuned)
        )
        found = align(base, tuned)
        after = aligned(tuned, found)
        before = _total(base, tuned)
        left = _total(base, after)
        strangers += not found.confident
        loud += left < _LOUD * before
        for site, b, t in zip(sites, base, after, strict=True):
            norm, weight = float((t.double() - b.double()).norm()), float(b.double().norm())
            rows[site] = {
                "aligned_frobenius": norm,
                "aligned_relative": norm / weight if weight else math.nan,
                **_columns(found),
            }
    if loud:
        tell(
            f"In {loud} of {count} gated MLPs neurons changed place or scale, which changes nothing that the "
            "model computes: read aligned_relative there, and transplant single matrices with care."
        )
    if strangers:
        tell(f"In {strangers} of {count} gated MLPs no neuron of tuned resembles one of base.")
    return rows


def _mlps(pairing: Pairing) -> list[tuple[Site, Site, Site]]:
    """The gate, up and down of each MLP that has all three, and whose shapes make one."""
    found: dict[tuple[Any, ...], dict[str, Site]] = defaultdict(dict)
    for site in pairing.comparable:
        real = "complex" not in pairing.base.dtype(site) + pairing.tuned.dtype(site)
        if real and site.role in _ROLES and site.param == "weight":
            found[(site.tower, site.stack, site.layer, site.expert, site.label)][site.role] = site
    whole = [tuple(mlp[role] for role in _ROLES) for mlp in found.values() if len(mlp) == len(_ROLES)]
    return [(gate, up, down) for gate, up, down in whole if _fit(*map(pairing.base.shape, (gate, up, down)))]


def _fit(gate: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(gate) == 2 and gate == up == down[::-1] and math.prod(gate) > 0


def _total(base: Mlp, tuned: Mlp) -> float:
    norms = [float((t.double() - b.double()).norm()) for b, t in zip(base, tuned, strict=True)]
    return math.hypot(*norms)


def _columns(found: Alignment) -> dict[str, Any]:
    return {"neurons_moved": found.moved, "neurons_rescaled": found.rescaled, "alignment": found.confidence}
