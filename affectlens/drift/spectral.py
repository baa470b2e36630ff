"""The singular values of each change, site by site, as columns of the table."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from affectlens.drift.planning import Detail, Strip
from affectlens.drift.spectra import Spectrum, factored_spectrum, spectrum
from affectlens.drift.streaming import Show
from affectlens.drift.sums import Sums
from affectlens.sites import Site

LARGEST = 1 << 28  # elements of a matrix; a float32 copy of it and of base must fit the memory
_GREATEST = 1e36  # ‖·‖² beyond which float32 can't hold what a spectrum is made of
_QUICK = 1024  # the smaller side up to which every singular value is computed without being asked for


def spectral(
    found: Mapping[Strip, Sums], k: int, *, detail: Detail, tell: Callable[[str], Any], show: Show
) -> dict[Site, dict[str, Any]]:
    """The spectra of all matrices that moved; `tell` hears of those too large to be had.

    The effective rank of a matrix whose smaller side exceeds 1,024 takes longer than all else together: it
    is null unless `detail="exact"`.
    """
    rows = {}
    for strip, sums in show(list(found.items()), "matrix"):
        if len(strip.sides[0].shape(strip.site)) != 2 or not sums["dd"] or sums.nonfinite:
            continue
        complex_ = any("complex" in side.dtype(strip.site) for side in strip.sides)
        if complex_ or max(sums["dd"], sums["bb"]) > _GREATEST:
            tell(f"{strip.site.parameter} holds complex or very large numbers, so it has no spectrum.")
            continue
        if strip.size > LARGEST:
            tell(f"{strip.site.parameter} has {strip.size:,} elements, too many for its spectrum.")
            continue
        rows[strip.site] = _columns(_spectrum(strip, k, detail))
    return rows


def _spectrum(strip: Strip, k: int, detail: Detail) -> Spectrum:
    base = _matrix(strip, 0)
    if strip.factors is not None:
        delta = strip.factors[0]
        b, a, _ = delta.factors
        return factored_spectrum(b, a, k=k, scale=delta.scale_up_to_alpha, base=base)
    change = _matrix(strip, 1).sub_(base)
    return spectrum(change, k, base=base, everything=detail.exact or min(change.shape) <= _QUICK)


def _matrix(strip: Strip, number: int) -> Tensor:
    rows = strip.sides[0].shape(strip.site)[0], strip.sides[1].shape(strip.site)[0]
    found: Tensor = strip.sides[number].read(strip.site, slice(0, min(rows))).cpu()
    return found.to(torch.float32, copy=True)


def _columns(found: Spectrum) -> dict[str, Any]:
    """Values that did not converge are given with their residual, and no rank follows from them."""
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
