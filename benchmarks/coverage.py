"""Measure how often the 95 % intervals contain the truth, as a share of repetitions.

    python benchmarks/coverage.py

Means of normal, skewed and clustered values by the bootstrap, paired differences of accuracy by Tango's.
"""

from collections.abc import Callable

import numpy as np

from affectlens.stats.intervals import bootstrap, effective, tango, wilson

REPEATS = 1000
COUNTS = (10, 20, 40, 60, 108, 250)

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray, float]]


def main() -> None:
    """Print one row a kind of data, one column a number of examples or clusters."""
    print("data".ljust(34), *(f"n={count}".rjust(7) for count in COUNTS))
    rows: dict[str, Draw] = {
        "normal": lambda rng, n: (rng.normal(size=n), np.arange(n), 0.0),
        "skewed (exponential)": lambda rng, n: (rng.exponential(size=n), np.arange(n), 1.0),
        "n clusters of 2, correlation .5": _clustered,
    }
    for name, draw in rows.items():
        print(name.ljust(34), *(f"{_share(draw, count):7.3f}" for count in COUNTS))
    accuracy = (f"{_accuracy(count, 0.9):7.3f}" for count in COUNTS)
    print("accuracy .9, n pairs, half alike".ljust(34), *accuracy)
    for gain, loss in ((0.03, 0.03), (0.3, 0.1)):
        shares = (_paired(count, gain, loss) for count in COUNTS)
        print(f"paired accuracy, +{gain} −{loss}".ljust(34), *(f"{share:7.3f}" for share in shares))


def _clustered(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    clusters = np.repeat(np.arange(n), 2)
    return rng.normal(size=n)[clusters] + rng.normal(size=2 * n), clusters, 0.0


def _share(draw: Draw, count: int) -> float:
    rng = np.random.default_rng(count)
    held = 0
    for _ in range(REPEATS):
        values, clusters, truth = draw(rng, count)
        _, low, high = bootstrap(values, clusters)
        held += low <= truth <= high
    return held / REPEATS


def _accuracy(count: int, share: float) -> float:
    rng = np.random.default_rng(count)
    clusters, held = np.repeat(np.arange(count), 2), 0
    for _ in range(REPEATS):
        both = rng.random((count, 2)) < share
        values = np.where(rng.random((count, 1)) < 0.5, both[:, :1], both).reshape(-1).astype(float)
        worth = effective(values, clusters)
        _, low, high = wilson(values.mean() * worth, worth)
        held += low <= share <= high
    return held / REPEATS


def _paired(count: int, gain: float, loss: float) -> float:
    rng = np.random.default_rng(count)
    draws = rng.multinomial(count, [gain, loss, 1 - gain - loss], size=REPEATS).tolist()
    found = (tango(g, lost, n=count) for g, lost, _ in draws)
    return sum(low <= gain - loss <= high for _, low, high in found) / REPEATS


if __name__ == "__main__":
    main()
