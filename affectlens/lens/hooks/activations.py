"""What passed a point: kept as it was, or as running sums over all positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from affectlens.errors import LensError


@dataclass(eq=False)
class Activations:
    """The values that passed a point, and which of them count.

    `values` is (batch, position, feature), the feature last in any case: a tower without positions of text
    keeps its own shape. Of a point with a span the positions are those of the span, padded on the left where
    rows have more or fewer; `chosen`, (batch, position), is false for padding. `gradients` is like `values`.
    """

    values: Float[Tensor, "... feature"]
    chosen: Bool[Tensor, "batch position"] | None = None
    gradients: Float[Tensor, "... feature"] | None = None

    @property
    def rows(self) -> Float[Tensor, "row feature"]:
        """The values that count, one row a position."""
        return _rows(self.values, self.chosen)

    @property
    def mean(self) -> Float[Tensor, " feature"]:
        """Their mean, in float64. Raises `LensError` where nothing passed."""
        if not len(self.rows):
            raise LensError("nothing passed, so there is no mean")
        return self.rows.double().mean(0)


@dataclass(eq=False)
class Statistics:
    """Sums over all positions that passed, in float64: a mean and a second moment without the values."""

    count: int = 0
    total: Float[Tensor, " feature"] | None = None
    products: Float[Tensor, "feature feature"] | None = None

    @property
    def mean(self) -> Float[Tensor, " feature"]:
        """The mean activation, in float64. Raises `LensError` where nothing passed."""
        if self.total is None or not self.count:
            raise LensError("nothing passed, so there is no mean")
        return self.total / self.count

    @property
    def second(self) -> Float[Tensor, "feature feature"]:
        """The uncentred second moment E[x·xᵀ], in float64. Raises `LensError` where it was not kept."""
        if self.products is None:
            raise LensError("the second moment was not kept; record with keep='second'")
        return self.products / self.count

    @property
    def covariance(self) -> Float[Tensor, "feature feature"]:
        """The covariance, in float64. Raises `LensError` where the second moment was not kept."""
        return self.second - torch.outer(self.mean, self.mean)

    def add(self, rows: Float[Tensor, "row feature"], *, products: bool) -> None:
        """Add some rows."""
        self.count += len(rows)
        total = rows.double().sum(0)
        self.total = total if self.total is None else self.total + total
        if products:
            more = rows.double().mT @ rows.double()
            self.products = more if self.products is None else self.products + more


def joined(batches: Sequence[Sequence[Activations]]) -> Activations:
    """Steps put after each other, and batches below each other, padded on the left.

    Raises `LensError` where nothing passed, or shapes without positions differ.
    """
    if not batches:
        raise LensError("nothing passed: no forward pass reached this point")
    whole = [_after(steps) for steps in batches]
    if len(whole) == 1:
        return whole[0]
    if any(one.chosen is None for one in whole):
        if len({one.values.shape[1:] for one in whole}) > 1:
            raise LensError("what passed has another shape in each batch; record them one by one")
        return Activations(
            torch.cat([one.values for one in whole]), None, _all([one.gradients for one in whole])
        )
    most = max(one.values.shape[1] for one in whole)
    padded = [_padded(one, most) for one in whole]
    chosen = _all([one.chosen for one in padded])
    return Activations(
        torch.cat([one.values for one in padded]), chosen, _all([one.gradients for one in padded])
    )


def of_span(
    values: Float[Tensor, "batch position feature"], chosen: Bool[Tensor, "batch position"]
) -> Activations:
    """The chosen positions alone, in order, padded on the left to the longest row."""
    most = int(chosen.sum(1).max())
    # Stable: what is not chosen comes first, so that the padding is on the left as in the batch.
    order = torch.sort(chosen.byte(), dim=1, stable=True).indices[:, chosen.shape[1] - most :]
    row = torch.arange(len(chosen), device=chosen.device)[:, None]
    return Activations(values[row, order], chosen[row, order])


def spread(chosen: Bool[Tensor, "batch position"], values: Tensor) -> Tensor:
    """A mask of positions as one that fits values, which may have several dimensions a position."""
    return chosen.to(values.device).reshape(*chosen.shape, *(1,) * (values.ndim - chosen.ndim))


def _after(steps: Sequence[Activations]) -> Activations:
    if len(steps) == 1:
        return steps[0]
    gradients, chosen = (_all([getattr(s, n) for s in steps], dim=1) for n in ("gradients", "chosen"))
    return Activations(torch.cat([step.values for step in steps], dim=1), chosen, gradients)


def _padded(one: Activations, most: int) -> Activations:
    more = most - one.values.shape[1]
    pad = torch.nn.functional.pad
    gradients = None if one.gradients is None else pad(one.gradients, (0, 0, more, 0))
    assert one.chosen is not None
    return Activations(pad(one.values, (0, 0, more, 0)), pad(one.chosen, (more, 0)), gradients)


def _all(tensors: Sequence[Tensor | None], *, dim: int = 0) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there, dim=dim) if len(there) == len(tensors) else None


def _rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    values = values if chosen is None else values[chosen]
    flat: Tensor = rearrange(values, "... feature -> (...) feature") if values.ndim != 2 else values
    return flat
