"""The engine without a compiler: what `kernel` does to words, done in torch to blocks of float32."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from affectlens.drift import measuring
from affectlens.drift.sums import Sums

_KINDS = {"uint32": torch.bfloat16, "int32": torch.float16, "uint64": torch.float32}


def measure(sides: Any, sums: Any) -> None:
    """Add the sums of (base, tuned) to `sums`."""
    base, tuned = map(_values, sides)
    _gather(sums, measuring.measure(base, tuned))


def still(base: Any, sums: Any) -> None:
    """The same where both sides are known to be equal."""
    b = _values(base)
    _gather(sums, measuring.measure(b, b))


def beside(sides: Any, sums: Any) -> None:
    """Add the sums of BESIDE, of (base, tuned, control): c the control's change, d the tuned one's."""
    base, tuned, control = map(_values, sides)
    found = measuring.measure(base, tuned, control=control).control
    assert found is not None
    largest = max(sums[3], found[3])
    sums += found
    sums[3] = largest


def _gather(sums: Any, found: Sums) -> None:
    if found.nonfinite:
        sums[:] = np.nan  # as the sums of the compiled engine would be
        return
    largest = max(sums[5], found.vector[5])
    sums += found.vector
    sums[5] = largest


def _values(words: Any) -> Tensor:
    return torch.from_numpy(words.view(np.int16)).view(_KINDS[words.dtype.name])
