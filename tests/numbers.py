"""Compare numbers that were computed: how far rounding may take them apart on any processor.

Processors, libraries and versions add in different orders. Results are therefore equal to the bit only
where the code copies values or runs the same kernel on the same shapes; anywhere else a test asks
`rounding` for its tolerance, and never that two results are rounded differently.
"""

import math

import torch
from torch import Tensor

from affectlens.drift.numba_engine import _CHUNK

SUMMED = 10**6  # float32 terms that a value of a tiny model depends on, one after another: layers × widths
ROUNDED = 100  # times that such a value is rounded to its own dtype on its way


def rounding(terms: int, *, dtype: torch.dtype = torch.float32) -> float:
    """Bound the error of a sum of `terms` in any order, as a share of the sum of their magnitudes.

    √n·ε, for rounding errors that are independent (Higham & Mary, SIAM J. Sci. Comput. 41, 2019); n·ε
    in the worst case, which sums in several lanes never come near.
    """
    return math.sqrt(terms) * torch.finfo(dtype).eps


LANES = rounding(2 * _CHUNK)  # of a norm: the compiled engine adds up so many values in float32


def differ(one: Tensor, two: Tensor) -> bool:
    """Whether two outputs of a model differ by more than rounding explains; tokens, whether any differs."""
    if not one.is_floating_point():
        return not torch.equal(one, two)
    dtype = one.dtype
    one, two = one.detach().double(), two.detach().double()
    scale = max(float(one.abs().max()), float(two.abs().max()))
    allowed = rounding(SUMMED) + rounding(ROUNDED, dtype=dtype)
    return float((one - two).abs().max()) > allowed * scale
