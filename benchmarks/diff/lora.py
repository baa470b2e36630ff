"""Compare norms of LoRA from the factors, as the engine computes them, with making B·A first.

Both begin with factors as stored in an adapter. B·A is made in float32, the cheapest way; norms from the
factors are computed in float64, part by part as in a diff.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from affectlens.checkpoints.adapters.factor_names import Pair
from affectlens.checkpoints.adapters.low_rank import LowRank
from affectlens.drift.blocks import _lines, _product
from affectlens.drift.parts import PART
from affectlens.sites import Storage


@dataclass(frozen=True)
class _Factors:
    """A store of the two factors."""

    tensors: dict[str, Tensor]
    name: str = "factors"
    format: str = "files"

    def read(self, tensor: str, rows: slice | None = None) -> Tensor:
        return self.tensors[tensor]


def contestants(rank: int, shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Return functions for the norm and the norms of rows, each from `factors` and `made`."""
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, shape[1], generator=generator) * 0.02
    b = torch.randn(shape[0], rank, generator=generator) * 0.02
    step = max(1, PART // (2 * shape[1]))
    parts = [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def delta() -> LowRank:
        store: Any = _Factors({"a": a, "b": b})
        return LowRank(store, Pair(a="a", b="b"), Storage("w", shape), scale=1.0, rank=rank)

    def norm() -> float:
        change = delta()
        return sqrt(sum(_product(change, change, rows) for rows in parts))

    def lines() -> Any:
        change = delta()
        return np.sqrt(np.concatenate([_lines(change, rows, 0)[0] for rows in parts]))

    return {
        "norm from factors": norm,
        "norm made": lambda: float((b @ a).norm(dim=1).double().norm()),  # one float32 sum is 0.7 % wrong
        "rows from factors": lines,
        "rows made": lambda: (b @ a).norm(dim=1).numpy(),
    }
