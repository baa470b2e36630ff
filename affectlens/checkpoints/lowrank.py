"""A low-rank change of one site: scale · B·A, and DoRA's rescaling of rows where there is a magnitude."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from affectlens.checkpoints.checkpoint import Store
from affectlens.checkpoints.factors import Pair
from affectlens.errors import CheckpointError
from affectlens.sites import Cut, Storage


@dataclass(frozen=True)
class LowRank:
    """The factors of one site, as an adapter stores them; read when first asked for.

    `where` is the site's place in the whole parameter that the factors change, e.g. a third of a fused
    QKV. `scale` is None where alpha is known to nobody: the change is then known up to a factor.
    """

    store: Store
    pair: Pair
    where: Storage
    scale: float | None

    @property
    def decomposed(self) -> bool:
        """Whether this is DoRA, whose change is no product of factors."""
        return bool(self.pair.magnitude)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, rank) and A (rank, in) of the site, in float64, without the scale."""
        a, b = (self.store.read(name).double() for name in (self.pair.a, self.pair.b))
        if self.pair.embedding:
            a, b = b.mT, a.mT
        b, a = b.reshape(len(b), -1), a.reshape(len(a), -1)
        if not torch.isfinite(a.sum() + b.sum()):
            raise CheckpointError(self.store.name, "NaN or infinity in a LoRA factor", key=self.pair.a)
        cut = self.where.cut
        if cut is None:
            return b, a
        across = (cut.dim == 0) == self.where.transposed  # the stored matrix may be turned
        index = indices(cut, a.shape[1] if across else b.shape[0])
        return (b, a[:, index]) if across else (b[index], a)

    @cached_property
    def gram(self) -> Tensor:
        """A·Aᵀ, rank × rank: what ‖B·A‖ needs of A."""
        a = self.factors[1]
        return a @ a.T

    def delta(self, wanted: slice) -> Tensor:
        """Rows of scale · B·A as float32, of the shape of the site's."""
        b, a = self.factors
        found = (self._scale() * b[wanted]) @ a
        return found.float().reshape(-1, *self.where.shape[1:])

    def applied(self, base: Tensor, wanted: slice) -> Tensor:
        """Rows of the changed weight as float32, given those of the base."""
        changed = base.float() + self.delta(wanted)
        if not self.decomposed:
            return changed
        # arXiv 2402.09353, eq. 5: the direction is normalised row by row, its length is learned.
        length = self._magnitude[wanted].float() / torch.linalg.norm(changed, dim=1)
        found: Tensor = changed * length[:, None]
        return found

    @cached_property
    def _magnitude(self) -> Tensor:
        found = self.store.read(self.pair.magnitude).reshape(-1)
        cut = self.where.cut
        return found if cut is None else found[indices(cut, len(found))]

    def _scale(self) -> float:
        if self.scale is None:
            fix = "Give alpha= or preset=; `diff` without detail='exact' compares up to that factor"
            raise CheckpointError(
                self.store.name, "no file says alpha, so the weights are not known", fix=fix
            )
        return self.scale


def indices(cut: Cut, length: int) -> Tensor:
    """The indices along its dimension that a cut takes of `length`."""
    period = cut.period or length
    groups = torch.arange(length).reshape(-1, period)
    return groups[:, cut.start : cut.stop].reshape(-1)
