"""95 % intervals: score intervals for counts, and a bootstrap over clusters for everything else.

The plain bootstrap is too narrow for few examples and for rare discordant pairs; the score intervals of
Wilson (1927) and Tango (1998, Stat. Med. 17) keep their coverage there. `benchmarks/coverage.py` measures it.
"""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(0.975)
DRAWS = 2000
FEWEST = 4  # clusters; below that there is no interval
_BESIDE = 1e-9  # from the value to where the search for an end starts


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def clear_of_zero(self) -> bool:
        """True if zero is outside; False without an interval (NaN)."""
        return self.low > 0 or self.high < 0

    @property
    def divides(self) -> bool:
        """True if it can be the denominator of a share: clear of zero, and no wider than its own size."""
        return self.clear_of_zero and self.high - self.low <= abs(self.value)


def wilson(hits: int | float, n: int | float) -> Interval:
    """Return Wilson's score interval of a proportion; `n` may be an effective number (see `effective`)."""
    p, z2 = hits / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At p = 0 and p = 1 one end is p itself; without min and max it would miss p by the last bit.
    return Interval(p, min(p, max(0.0, float(middle - half))), max(p, min(1.0, float(middle + half))))


def effective(values: Float[np.ndarray, " examples"], clusters: Int[np.ndarray, " examples"]) -> float:
    """Return the effective number of independent examples: n over the design effect (Kish 1965).

    It is between the number of clusters and n. Values that are all equal do not show how alike the examples
    of a cluster are, so each cluster counts as one example.
    """
    n, count = len(values), int(clusters.max()) + 1
    if count == n or count < 2:
        return float(count)
    alone = float(values.var()) / n
    if alone == 0:
        return float(count)
    sums = np.bincount(clusters, weights=values - values.mean())
    together = float((sums**2).sum()) / n**2 * count / (count - 1)
    return n / min(max(together / alone, 1.0), n / count)


def tango(gained: int | float, lost: int | float, *, n: int | float) -> Interval:
    """Return Tango's score interval of a difference of paired proportions.

    Of `n` pairs, `gained` went from wrong to right and `lost` from right to wrong; for clustered pairs, give
    effective numbers.
    """
    from scipy.optimize import brentq

    value = (gained - lost) / n

    def excess(delta: float, level: float) -> float:
        """Return how far the score is above a level, times its standard error, which may be zero."""
        # Under the difference delta, the likelihood of q = P(right → wrong) is largest at a root of a
        # quadratic.
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = max(n * (2 * q + delta * (1 - delta)), 0.0)
        return gained - lost - n * delta - level * math.sqrt(variance)

    def crossing(end: float, level: float) -> float:
        # At the value itself gap and error may both be zero, which is no crossing: start beside it.
        beside = value + math.copysign(_BESIDE, end - value)
        if abs(end - value) <= _BESIDE:
            return end
        return float(brentq(excess, beside, end, args=(level,)))

    # The score falls as delta grows: it crosses ±z once on either side of the value.
    return Interval(value, crossing(-1.0, Z), crossing(1.0, -Z))


def bootstrap(
    values: Float[np.ndarray, " examples"], clusters: Int[np.ndarray, " examples"], *, seed: int = 0
) -> Interval:
    """Return the BCa bootstrap interval of a mean, resampling whole clusters (Efron 1987).

    With few clusters the bootstrap is too narrow, so the quantiles come from Student's t and are widened by
    √(k/(k−1)) for k clusters (Hesterberg 2015, The American Statistician 69). Fewer than four clusters say
    too little about the spread: their interval is NaN.
    """
    sums = np.bincount(clusters, weights=values)
    sizes = np.bincount(clusters).astype(float)
    mean = float(values.mean())
    count = len(sums)
    if count < FEWEST:
        return Interval(mean, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    weights = _weights(count, seed)
    draws = np.sort((weights @ sums) / (weights @ sizes))
    below = np.clip(((draws < mean).mean() + (draws <= mean).mean()) / 2, 1 / DRAWS, 1 - 1 / DRAWS)
    bias = _NORMAL.inv_cdf(float(below))
    jack = (sums.sum() - sums) / (sizes.sum() - sizes)
    away = jack.mean() - jack
    skew = float((away**3).sum() / (6 * (away**2).sum() ** 1.5)) if np.any(away) else 0.0
    wide = _student(count - 1) * math.sqrt(count / (count - 1))
    ends = [bias + (bias + z) / (1 - skew * (bias + z)) for z in (-wide, wide)]
    low, high = (float(np.quantile(draws, _NORMAL.cdf(end))) for end in ends)
    return Interval(mean, min(low, mean), max(high, mean))


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


@lru_cache(maxsize=8)
def _weights(count: int, seed: int) -> Float[np.ndarray, "draws clusters"]:
    # Cached, so that all means over the same clusters are compared on the same resamples.
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)
