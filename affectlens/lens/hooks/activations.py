"""Activations of a point: the values themselves, or running sums over all positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from affectlens.errors import LensError

_EMPTY = "nothing passed this point, so it has no mean"


@dataclass(eq=False)
class Activations:
    """The values that passed a point, and which of them are not padding.

    `values` is (batch, position, feature). A tower without text positions keeps its own shape, with the
    feature last. A point with a span has the positions of the span alone, padded on the left to the longest
    row. `chosen`, (batch, position), is false for padding; in a tower it has as many of the first dimensions
    as padding needs, and is None without any. `gradients` has the shape of `values`.
    """

    values: Float[Tensor, "... feature"]
    chosen: Bool[Tensor, "batch ..."] | None = None
    gradients: Float[Tensor, "... feature"] | None = None

    @property
    def rows(self) -> Float[Tensor, "row feature"]:
        """The values without padding, one row per position."""
        return _rows(self.values, self.chosen)

    @property
    def mean(self) -> Float[Tensor, " feature"]:
        """The mean over all rows, in float64. Raises `LensError` where there are none."""
        if not len(self.rows):
            raise LensError(_EMPTY)
        return self.rows.double().mean(0)


@dataclass(eq=False)
class Statistics:
    """Sums over all positions that passed, in float64: they give moments without keeping the values."""

    count: int = 0
    total: Float[Tensor, " feature"] | None = None
    products: Float[Tensor, "feature feature"] | None = None

    @property
    def mean(self) -> Float[Tensor, " feature"]:
        """The mean activation, in float64. Raises `LensError` where nothing passed."""
        if self.total is None or not self.count:
            raise LensError(_EMPTY)
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
        """Add rows to the sums; `products` keeps the second moment too."""
        self.count += len(rows)
        total = rows.double().sum(0)
        self.total = total if self.total is None else self.total + total
        if products:
            more = rows.double().mT @ rows.double()
            self.products = more if self.products is None else self.products + more


def joined(batches: Sequence[Sequence[Activations]]) -> Activations:
    """Join the steps of each batch along positions, and the batches along rows, padded on the left.

    Raises `LensError` where nothing passed, or where shapes without positions differ.
    """
    if not batches:
        raise LensError("nothing passed this point: no forward pass reached it")
    whole = [_after(steps) for steps in batches]
    if len(whole) == 1:
        return whole[0]
    known = [one.chosen.ndim for one in whole if one.chosen is not None]
    shapes = {one.values.shape[2 if known and min(known) > 1 else 1 :] for one in whole}
    if len(shapes) > 1 or len(set(known)) > 1:
        raise LensError("the activations differ in shape between batches; record them one by one")
    if not known:
        return _after(whole, dim=0)
    whole = [_with_mask(one, known[0]) for one in whole]
    if known[0] == 1:
        return _after(whole, dim=0)
    most = max(one.values.shape[1] for one in whole)
    padded = [_padded(one, most) for one in whole]
    chosen = _all([one.chosen for one in padded])
    return Activations(
        torch.cat([one.values for one in padded]), chosen, _all([one.gradients for one in padded])
    )


def of_span(
    values: Float[Tensor, "batch position feature"], chosen: Bool[Tensor, "batch position"]
) -> Activations:
    """Return the chosen positions alone, in order, padded on the left to the longest row."""
    most = int(chosen.sum(1).max())
    # A stable sort by 'chosen' moves the other positions to the front: padding on the left, as in a batch.
    order = torch.sort(chosen.byte(), dim=1, stable=True).indices[:, chosen.shape[1] - most :]
    row = torch.arange(len(chosen), device=chosen.device)[:, None]
    return Activations(values[row, order], chosen[row, order])


def spread(chosen: Bool[Tensor, "batch position"], values: Tensor) -> Tensor:
    """Reshape a mask of positions so that it broadcasts over values with more dimensions.

    >>> spread(torch.tensor([[True, False]]), torch.zeros(1, 2, 4)).shape
    torch.Size([1, 2, 1])
    """
    return chosen.to(values.device).reshape(*chosen.shape, *(1,) * (values.ndim - chosen.ndim))


def _after(steps: Sequence[Activations], *, dim: int = 1) -> Activations:
    if len(steps) == 1:
        return steps[0]
    gradients, chosen = (_all([getattr(s, n) for s in steps], dim=dim) for n in ("gradients", "chosen"))
    return Activations(torch.cat([step.values for step in steps], dim=dim), chosen, gradients)


def _with_mask(one: Activations, dims: int) -> Activations:
    """Return activations of a tower without padding with a mask, as those of other batches have one."""
    if one.chosen is not None:
        return one
    whole = torch.ones(one.values.shape[:dims], dtype=torch.bool, device=one.values.device)
    return Activations(one.values, whole, one.gradients)


def _padded(one: Activations, most: int) -> Activations:
    more = most - one.values.shape[1]
    pad = torch.nn.functional.pad
    left = (0, 0) * (one.values.ndim - 2) + (more, 0)  # of positions; behind them may be heads and features
    gradients = None if one.gradients is None else pad(one.gradients, left)
    assert one.chosen is not None
    own = pad(one.chosen, (0, 0) * (one.chosen.ndim - 2) + (more, 0))
    return Activations(pad(one.values, left), own, gradients)


def _all(tensors: Sequence[Tensor | None], *, dim: int = 0) -> Tensor | None:
    """Concatenate tensors; None where one is missing, as gradients are."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there, dim=dim) if len(there) == len(tensors) else None


def _rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    values = values if chosen is None else values[chosen]
    flat: Tensor = rearrange(values, "... feature -> (...) feature") if values.ndim != 2 else values
    return flat
