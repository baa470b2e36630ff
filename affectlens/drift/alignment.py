"""Undo the permutation and rescaling symmetries of a gated MLP.

out = down @ (act(gate x) · (up x)) stays the same when neurons are permuted, and when a neuron's row of
up is multiplied by s ≠ 0 and its column of down divided by s; the gate, inside act, can't be rescaled.
If two models differ only in this way, their drift is large and means nothing. In an ordinary fine-tune
every neuron still resembles itself, and none is moved. In unrelated models no neuron resembles another,
and none is moved either: `confidence` tells the two cases apart.

After Ainsworth et al., Git Re-Basin, ICLR 2023 (section 3.2, weight matching), with the scalings added.
`affectlens.diff(..., align=True)` calls this layer by layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CLEAR = 0.8  # a neuron this similar to its namesake keeps its place without a search
SOLVED = 8192  # up to so many neurons the assignment problem is solved
_RESCALED = 0.05
_SAMPLE = 256  # neurons tried first: if none of them finds a partner, the search ends
_BLOCK = 2048  # neurons compared at a time
_Indices = np.ndarray[Any, np.dtype[np.int64]]
_Numbers = np.ndarray[Any, np.dtype[np.float64]]


class Mlp(NamedTuple):
    """The weights of down @ (act(gate x) · (up x)); a row of gate and up, a column of down, is a neuron."""

    gate: Float[Tensor, "neurons hidden"]
    up: Float[Tensor, "neurons hidden"]
    down: Float[Tensor, "hidden neurons"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """The matching of tuned neurons to base neurons, and their scales.

    Tuned neuron `permutation[i]` matches base neuron i when its row of up is multiplied by `scales[i]`
    and its column of down divided by it. `confidence` is the median over neurons of their similarity,
    the mean of the cosines of gate, up and down: near 1 for tunings of one model, about 0 for unrelated
    models, whose alignment is the identity. `chance` is a similarity that unrelated models don't reach:
    well above 0 where all neurons share a direction. `greedy` is true where too many neurons were left
    to solve the assignment problem, so that only pairs that are each other's nearest were matched.
    """

    permutation: _Indices
    scales: _Numbers
    confidence: float
    chance: float
    greedy: bool = False

    @property
    def confident(self) -> bool:
        """Whether most neurons found a partner beyond chance; if not, the alignment is unknown."""
        return self.confidence >= self.chance

    @property
    def moved(self) -> int:
        """The number of neurons matched to one of another index."""
        return int((self.permutation != np.arange(len(self.permutation))).sum())

    @property
    def rescaled(self) -> int:
        """The number of neurons with a scale more than 5 % away from 1."""
        return int((np.abs(self.scales - 1) > _RESCALED).sum())


def align(base: Mlp, tuned: Mlp) -> Alignment:
    """Match the neurons of `tuned` to those of `base` by features that the symmetries don't change.

    Neurons that resemble none beyond chance keep their scale, and their place where it is free; if most
    neurons are like that, all keep theirs. Raises ValueError where the shapes don't fit.
    """
    _check(base, tuned)
    count = len(base.gate)
    everyone = torch.arange(count)
    chance = _chance(base, tuned)
    permutation = everyone.clone()
    rest = everyone[_paired(base, tuned, everyone) < max(CLEAR, chance)]
    greedy = False
    if len(rest) and _any_partner(base, tuned, rest, chance):
        permutation[rest], greedy = _matched(base, tuned, rest, chance)
    scores = _paired(base, tuned, permutation)
    confidence = float(scores.double().median()) if count else math.nan
    scales = torch.ones(count, dtype=torch.float64)
    if confidence >= chance:
        scales = torch.where(scores >= chance, _scales(base, tuned, permutation), 1.0)
    else:
        # Even unrelated layers have a few neurons alike; to match those alone would mean nothing.
        permutation = everyone
    return Alignment(permutation.numpy(), scales.numpy(), confidence, chance, greedy)


def aligned(tuned: Mlp, alignment: Alignment) -> Mlp:
    """Permute and rescale the neurons of `tuned`; it computes the same function as before.

    Rescaled weights are float32 or wider: rounding to 16 bits would look like drift.
    """
    order = torch.from_numpy(alignment.permutation).to(tuned.gate.device)
    up, down = tuned.up[order], tuned.down[:, order]
    if (alignment.scales != 1).any():
        up, down = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (up, down))
        scales = torch.from_numpy(alignment.scales).to(up.dtype).to(up.device)
        up, down = up * scales[:, None], down / scales
    return Mlp(tuned.gate[order], up, down)


def _check(base: Mlp, tuned: Mlp) -> None:
    shapes = [tuple(side.shape) for side in base]
    if shapes != [tuple(side.shape) for side in tuned]:
        raise ValueError(
            f"can't align MLPs of different shapes: gate, up, down are {shapes} in base and "
            f"{[tuple(side.shape) for side in tuned]} in tuned."
        )
    if base.gate.ndim != 2 or shapes != [shapes[0], shapes[0], shapes[0][::-1]]:
        raise ValueError(
            "can't align this MLP: gate and up must have shape (neurons, hidden) and down (hidden, "
            f"neurons), got {shapes}. Are they fused or transposed?"
        )


def _features(mlp: Mlp, neurons: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised gate rows, and up rows joined with down columns: the symmetry only flips a sign."""
    neurons = neurons.to(mlp.gate.device)
    sides = (mlp.gate[neurons], mlp.up[neurons], mlp.down[:, neurons].T)
    # A NaN would make every comparison false, and the assignment fail.
    gate, up, down = (
        torch.nn.functional.normalize(side.detach().float(), dim=1).nan_to_num(0, 0, 0).cpu()
        for side in sides
    )
    return gate, torch.cat([up, down], dim=1)


def _similarity(base: Mlp, tuned: Mlp, rows: Tensor, columns: Tensor) -> Tensor:
    """Return (rows, columns): the mean of three cosines, those of up and down with their common sign."""
    left, right = _features(base, rows), _features(tuned, columns)
    return (left[0] @ right[0].T + (left[1] @ right[1].T).abs()) / 3


def _paired(base: Mlp, tuned: Mlp, partners: Tensor) -> Tensor:
    """Return (neurons,): the similarity of base neuron i with tuned neuron partners[i]."""
    scores = torch.zeros(len(partners))
    for rows in _blocks(torch.arange(len(partners))):
        left, right = _features(base, rows), _features(tuned, partners[rows])
        gate, pair = ((one * two).sum(dim=1) for one, two in zip(left, right, strict=True))
        scores[rows] = (gate + pair.abs()) / 3
    return scores


def _chance(base: Mlp, tuned: Mlp) -> float:
    """Return a similarity that unrelated neurons don't reach, even the best pair of all.

    Cosines of random directions have a variance of 1/hidden; real neurons share directions, so chance is
    also measured on random pairs, by median and lower quantile: true pairs among them do no harm.
    """
    count, hidden = base.gate.shape
    centre, spread = 0.376 / math.sqrt(hidden), 0.438 / math.sqrt(hidden)
    if count >= 16:
        scores = _paired(base, tuned, _shuffled(count))
        low, middle = (float(scores.quantile(q)) for q in (0.16, 0.5))
        centre, spread = max(centre, middle), max(spread, middle - low)
    return min(centre + (math.sqrt(2 * math.log(max(count, 2))) + 3) * spread, 0.95)


def _any_partner(base: Mlp, tuned: Mlp, rest: Tensor, chance: float) -> bool:
    sample = rest[_shuffled(len(rest))[:_SAMPLE]]
    return any(bool((_similarity(base, tuned, sample, columns) >= chance).any()) for columns in _blocks(rest))


def _matched(base: Mlp, tuned: Mlp, rest: Tensor, chance: float) -> tuple[Tensor, bool]:
    """Return the partner of each neuron of `rest` within `rest`, and whether matching was greedy."""
    mutual, score, promising = _nearest(base, tuned, rest, chance)
    partner = torch.full((len(rest),), -1)
    clear = mutual.ge(0) & (score >= max(CLEAR, chance))
    partner[clear] = mutual[clear]
    free = torch.ones(len(rest), dtype=torch.bool)
    free[partner[clear]] = False
    # Neurons that resemble none are left out: the cost of the assignment grows with the cube of their number.
    rows, columns = ((~clear) & promising[0]).nonzero()[:, 0], (free & promising[1]).nonzero()[:, 0]
    greedy = max(len(rows), len(columns)) > SOLVED
    if greedy:
        found = mutual.ge(0) & (score >= chance)
        partner[found] = mutual[found]
    elif len(rows) and len(columns):
        for row, column in _assigned(base, tuned, (rest[rows], rest[columns]), chance):
            partner[rows[row]] = columns[column]
    return rest[_completed(partner)], greedy


def _nearest(
    base: Mlp, tuned: Mlp, rest: Tensor, chance: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return for each row its mutually nearest column, or −1, its score, and which sides have a partner."""
    count = len(rest)
    row_best, row_at = torch.full((count,), -math.inf), torch.zeros(count, dtype=torch.long)
    column_best, column_at = row_best.clone(), row_at.clone()
    for rows in _blocks(torch.arange(count)):
        for columns in _blocks(torch.arange(count)):
            scores = _similarity(base, tuned, rest[rows], rest[columns])
            _improve(row_best, row_at, scores.max(dim=1), rows, columns)
            _improve(column_best, column_at, scores.max(dim=0), columns, rows)
    mutual = torch.where(column_at[row_at] == torch.arange(count), row_at, -1)
    return mutual, row_best, (row_best >= chance, column_best >= chance)


def _improve(best: Tensor, at: Tensor, found: Any, own: Tensor, other: Tensor) -> None:
    better = found.values > best[own]
    best[own[better]] = found.values[better]
    at[own[better]] = other[found.indices[better]]


def _assigned(
    base: Mlp, tuned: Mlp, sides: tuple[Tensor, Tensor], chance: float
) -> Iterator[tuple[int, int]]:
    """Yield the best one-to-one assignment of the two sides, without pairs that chance explains."""
    from scipy.optimize import linear_sum_assignment

    scores = torch.cat([_similarity(base, tuned, rows, sides[1]) for rows in _blocks(sides[0])])
    for row, column in zip(*linear_sum_assignment(scores.numpy(), maximize=True), strict=True):
        if scores[row, column] >= chance:
            yield int(row), int(column)


def _completed(partner: Tensor) -> Tensor:
    """Give rows without a partner (−1) their own column where it is free, else another free one."""
    free = torch.ones(len(partner), dtype=torch.bool)
    free[partner[partner >= 0]] = False
    stays = (partner < 0) & free
    partner = torch.where(stays, torch.arange(len(partner)), partner)
    partner[partner < 0] = (free & ~stays).nonzero()[:, 0]
    return partner


def _scales(base: Mlp, tuned: Mlp, permutation: Tensor) -> Tensor:
    """Return (neurons,): the s that gives up·s and down/s base's ratio of norms and its sign; else 1."""
    scales = torch.ones(len(permutation), dtype=torch.float64)
    for rows in _blocks(torch.arange(len(permutation))):
        chosen = permutation[rows]
        sign = (_features(base, rows)[1] * _features(tuned, chosen)[1]).sum(dim=1)
        (up_b, down_b), (up_t, down_t) = _norms(base, rows), _norms(tuned, chosen)
        # In this order equal norms give exactly 1: x/x is 1 in floating point, (x/y)·(y/x) need not be.
        size = ((up_b / up_t) * (down_t / down_b)).sqrt()
        known = size.isfinite() & (size > 0)
        scales[rows] = torch.where(known, torch.where(sign < 0, -size, size), 1.0)
    return scales


def _norms(mlp: Mlp, neurons: Tensor) -> tuple[Tensor, Tensor]:
    neurons = neurons.to(mlp.up.device)
    # One layout for all: equal neurons are summed in the same order, so their norms are equal.
    up, down = mlp.up[neurons].contiguous(), mlp.down[:, neurons].contiguous()
    return up.detach().cpu().double().norm(dim=1), down.detach().cpu().double().norm(dim=0)


def _blocks(neurons: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(neurons), _BLOCK):
        yield neurons[start : start + _BLOCK]


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
