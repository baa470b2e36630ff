"""Columns that need whole matrices: spectra, and the drift after the neurons of MLPs are matched.

Both run after the streamed sums, one matrix or MLP at a time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from affectlens.checkpoints import Pairing
from affectlens.drift.alignment import Alignment, Mlp, align, aligned
from affectlens.drift.measures import Sums
from affectlens.drift.parts import Detail, Strip
from affectlens.drift.spectra import Spectrum, factored_spectrum, spectrum
from affectlens.drift.streaming import Show
from affectlens.sites import Site

_ROLES = ("gate_proj", "up_proj", "down_proj")
_LOUD = 0.9  # if less of the drift than this is left, the alignment changes how a table reads
LARGEST = 1 << 28  # elements of a matrix: a float32 copy of it and of base must fit into memory
_GREATEST = 1e36  # ‖·‖² beyond which float32 overflows in a spectrum
_QUICK = 1024  # up to this smaller side every singular value is computed without detail="exact"


def symmetric(pairing: Pairing, *, tell: Callable[[str], Any], show: Show) -> dict[Site, dict[str, Any]]:
    """Compute `aligned_frobenius` and `aligned_relative` of the three matrices of each gated MLP."""
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
            f"In {loud} of {count} gated MLPs neurons changed place or scale, which does not change what the "
            "model computes: read aligned_relative there, and transplant single matrices with care."
        )
    if strangers:
        tell(f"In {strangers} of {count} gated MLPs the neurons of tuned don't resemble those of base.")
    return rows


def spectral(
    found: Mapping[Strip, Sums], k: int, *, detail: Detail, tell: Callable[[str], Any], show: Show
) -> dict[Site, dict[str, Any]]:
    """Compute the spectra of all matrices that moved; `tell` reports those that have none.

    The effective rank of a matrix whose smaller side exceeds 1,024 takes longer than all else together: it
    is null unless `detail="exact"`.
    """
    rows = {}
    for strip, sums in show(list(found.items()), "matrix"):
        if len(strip.sides[0].shape(strip.site)) != 2 or not sums["dd"] or sums.nonfinite:
            continue
        complex_ = any("complex" in side.dtype(strip.site) for side in strip.sides)
        if complex_ or max(sums["dd"], sums["bb"]) > _GREATEST:
            tell(f"{strip.site.parameter} has complex or very large numbers: no spectrum was computed.")
            continue
        if strip.size > LARGEST:
            tell(f"{strip.site.parameter} has {strip.size:,} elements, too many to compute its spectrum.")
            continue
        rows[strip.site] = _spectral_columns(_spectrum(strip, k, detail))
    return rows


def _mlps(pairing: Pairing) -> list[tuple[Site, Site, Site]]:
    """Find the gate, up and down of each MLP that has all three in matching shapes."""
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


def _spectrum(strip: Strip, k: int, detail: Detail) -> Spectrum:
    base = _matrix(strip, 0)
    if strip.factors is not None:
        delta = strip.factors[0]
        b, a, _ = delta.factors
        return factored_spectrum(b, a, k=k, scale=delta.scale_up_to_alpha, base=base)
    change = _matrix(strip, 1).sub_(base)
    return spectrum(change, k, base=base, everything=detail.exact or min(change.shape) <= _QUICK)


def _matrix(strip: Strip, number: int) -> Tensor:
    most = min(side.shape(strip.site)[0] for side in strip.sides[:2])
    found = strip.read(number, rows=slice(0, most)).cpu()
    return found.to(torch.float32, copy=True)


def _spectral_columns(found: Spectrum) -> dict[str, Any]:
    """Return the columns of a spectrum; values that did not converge keep their residual, without ranks."""
    sure = found.converged
    return {
        "spectral_norm": found.spectral_norm,
        "stable_rank": found.stable_rank if sure else math.nan,
        "effective_rank": found.effective_rank,
        "singular_values": found.values,
        "residual": found.residual,
        "overlap_out": found.overlap[0],
        "overlap_in": found.overlap[1],
        "overlap_out_chance": found.expected[0],
        "overlap_in_chance": found.expected[1],
    }
