"""A low-rank change of one site: scale · B·A, and DoRA's rescaling of rows if there is a magnitude."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from affectlens.checkpoints.adapters.factor_names import Pair
from affectlens.checkpoints.store import Store
from affectlens.errors import CheckpointError
from affectlens.sites import Cut, Storage


class Factors(NamedTuple):
    """Factors of one site in float64, without the scale: B (out, rank), A (rank, in), and A·Aᵀ."""

    b: Tensor
    a: Tensor
    gram: Tensor


class Expert(NamedTuple):
    """One of the experts that share two factors: its number, their number, and whether B·A is transposed."""

    number: int
    experts: int
    turned: bool


@dataclass(frozen=True, eq=False)
class LowRank:
    """The factors of one site in an adapter, read when they are first used.

    `where` is the place of the site in the parameter that the factors change, e.g. a third of a fused QKV.
    `scale` is None if alpha is unknown: the change is then known up to a factor.
    """

    store: Store
    pair: Pair
    where: Storage
    scale: float | None
    rank: int
    expert: Expert | None = None

    @property
    def plain(self) -> bool:
        """Whether the change is that of a whole matrix by two factors of its own."""
        return bool(self.pair.a) and not self.pair.embedding and self.expert is None and not self.decomposed

    @property
    def decomposed(self) -> bool:
        """Whether this is DoRA, whose change is not a product of factors."""
        return bool(self.pair.magnitude)

    @property
    def factors(self) -> Factors:
        """The factors; those of a few sites are cached, since every part of a site needs them.

        Factors of a live model can change, so they are never cached.
        """
        return self.read() if self.store.format == "memory" else _factors(self)

    @property
    def scale_up_to_alpha(self) -> float:
        """The scale; 1/rank if alpha is unknown, so that modules of different rank can still be compared."""
        return 1 / self.rank if self.scale is None else self.scale

    def read(self) -> Factors:
        """Read the factors from the store."""
        if not self.pair.a:
            return self._bias()
        a, b = (self.store.read(name).double() for name in (self.pair.a, self.pair.b))
        # An embedding changes by (B·A)ᵀ: A is (rank, vocabulary), B is (hidden, rank).
        if self.pair.embedding:
            a, b = b.mT, a.mT
        # A convolution has more dimensions: its kernel counts as columns.
        b, a = b.reshape(len(b), -1), a.reshape(len(a), -1)
        for name, factor in ((self.pair.a, a), (self.pair.b, b)):
            if not torch.isfinite(factor).all():
                raise CheckpointError(self.store.name, "NaN or infinity in a LoRA factor", key=name)
        if self.expert is not None:
            number, count, turned = self.expert
            a, b = rearrange(a, "(e r) i -> e r i", e=count)[number], b[:, number::count]
            b, a = (a.mT, b.mT) if turned else (b, a)
        return self._cut(b, a)

    def _bias(self) -> Factors:
        """Return the bias of B, which is added to the bias of the matrix, as a change of rank 1."""
        b = self.store.read(self.pair.b).double().reshape(-1, 1)
        if not torch.isfinite(b).all():
            raise CheckpointError(self.store.name, "NaN or infinity in a LoRA bias", key=self.pair.b)
        return self._cut(b, torch.ones(1, 1, dtype=b.dtype))

    def _cut(self, b: Tensor, a: Tensor) -> Factors:
        """Keep the rows or columns of a site."""
        cut = self.where.cut
        if cut is not None:
            # Rows of a site are rows of B, columns are columns of A; a stored transpose swaps the two.
            across = (cut.dim == 0) == self.where.transposed
            index = indices(cut, a.shape[1] if across else b.shape[0])
            b, a = (b, a[:, index]) if across else (b[index], a)
        return Factors(b, a, a @ a.T)

    def delta(self, wanted: slice) -> Tensor:
        """Return rows of scale · B·A as float32, in the shape of the site."""
        b, a, _ = self.factors
        found = (self._scale() * b[wanted]) @ a
        return found.float().reshape(-1, *self.where.shape[1:])

    def applied(self, base: Tensor, wanted: slice) -> Tensor:
        """Return rows of the changed weight as float32, given those of the base."""
        changed = base.float() + self.delta(wanted)
        if not self.decomposed:
            return changed
        # arXiv 2402.09353, eq. 5: the direction is normalised row by row, its length is learned.
        length = self._magnitude()[wanted].float() / torch.linalg.norm(changed, dim=1)
        found: Tensor = changed * length[:, None]
        return found

    def _magnitude(self) -> Tensor:
        found = self.store.read(self.pair.magnitude).reshape(-1)
        cut = self.where.cut
        return found if cut is None else found[indices(cut, len(found))]

    def _scale(self) -> float:
        if self.scale is None:
            reason = "no file says alpha, so the weights are unknown"
            raise CheckpointError(self.store.name, reason, fix="Pass LoRA's alpha, or a preset")
        return self.scale


def indices(cut: Cut, length: int) -> Tensor:
    """Return the indices along its dimension that a cut takes of `length`."""
    period = cut.period or length
    groups = torch.arange(length).reshape(-1, period)
    return groups[:, cut.start : cut.stop].reshape(-1)


@lru_cache(maxsize=4)
def _factors(delta: LowRank) -> Factors:
    return delta.read()
