"""Agreement of rankings: Kendall's W with its permutation test, the sign test, median intervals."""

from itertools import permutations
from math import factorial

import numpy as np
from jaxtyping import Float

DRAWS, SEED = 9_999, 0
EXACT = 20_000  # up to so many arrangements are enumerated rather than drawn from
FEWEST = 6  # runs: with five that all agree, a two-sided sign test still gives 1/16


def kendall_w(ranks: Float[np.ndarray, "runs groups"]) -> float:
    """Return Kendall's W, corrected for ties; NaN where every run ties all groups."""
    runs, groups = ranks.shape
    counts = (np.unique(row, return_counts=True)[1] for row in ranks)
    ties = sum(int((count**3 - count).sum()) for count in counts)
    most = runs**2 * (groups**3 - groups) - runs * ties
    sums = ranks.sum(axis=0)
    return float(12 * ((sums - sums.mean()) ** 2).sum() / most) if most else np.nan


def chance(ranks: Float[np.ndarray, "runs groups"], *, seed: int = SEED) -> tuple[float, float, int | None]:
    """Test W by permuting within runs: p, the smallest p possible, and the draws (None: enumerated)."""
    runs, groups = ranks.shape
    # Sums of squared rank sums order arrangements as W does, and being multiples of 1/4 they compare
    # without rounding. When enumerating, one run may stay fixed: only the others relative to it matter.
    observed = float((ranks.sum(axis=0) ** 2).sum())
    if factorial(groups) ** (runs - 1) <= EXACT:
        sums = ranks[:1]
        for row in ranks[1:]:
            sums = (sums[:, None] + np.array(list(permutations(row)))).reshape(-1, groups)
        reached = (sums**2).sum(axis=1)
        return float((reached >= observed).mean()), float((reached == reached.max()).mean()), None
    rng = np.random.default_rng(seed)
    drawn = np.zeros((DRAWS, groups))
    for row in ranks:
        drawn += rng.permuted(np.tile(row, (DRAWS, 1)), axis=1)
    extreme = int(((drawn**2).sum(axis=1) >= observed).sum())
    return (extreme + 1) / (DRAWS + 1), 1 / (DRAWS + 1), DRAWS


def sign_test(larger: int, smaller: int) -> float:
    """Return p of the exact two-sided sign test; NaN below six runs, where none can reach .05."""
    from scipy.stats import binomtest

    runs = larger + smaller
    return float(binomtest(larger, runs).pvalue) if runs >= FEWEST else np.nan


def median_interval(values: Float[np.ndarray, " runs"]) -> tuple[float, float]:
    """Return the distribution-free interval of the median, coverage ≥ 95 %; NaN below six values."""
    from scipy.stats import quantile_test

    if len(values) < FEWEST:
        return np.nan, np.nan
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return float(low), float(high)


def spearman(one: Float[np.ndarray, " group"], two: Float[np.ndarray, " group"]) -> float:
    """Return Spearman's rank correlation; NaN where a side is constant or not finite."""
    from scipy.stats import spearmanr

    known = np.isfinite(one).all() and np.isfinite(two).all() and np.ptp(one) and np.ptp(two)
    return float(spearmanr(one, two).statistic) if known else np.nan  # scipy warns of a constant side
