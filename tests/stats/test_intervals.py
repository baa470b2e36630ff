"""Intervals: known answers, and the share of repetitions in which they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from affectlens.stats.intervals import Z, _student, bootstrap, effective, tango, wilson

# (gained, lost, n, low, high): solved by hand where one side is empty: ±z²/(n + z²).
TANGO = ((0, 0, 50, -0.07135, 0.07135), (50, 0, 50, 0.85729 - 0.00001, 1.0))


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (50, 60), (108, 108)])
def test_wilson_is_scipys(hits: int, n: int) -> None:
    """The interval of a proportion is that of an independent library."""
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")

    assert pytest.approx((expected.low, expected.high), abs=1e-9) == wilson(hits, n)[1:]


@pytest.mark.parametrize(("gained", "lost", "n", "low", "high"), TANGO)
def test_tango_known_answers(gained: int, lost: int, n: int, low: float, high: float) -> None:
    """Tango's interval at its closed-form corners."""
    assert pytest.approx((low, high), abs=2e-4) == tango(gained, lost, n=n)[1:]


@pytest.mark.parametrize("n", [1, 50])
def test_tango_of_pairs_that_all_go_one_way(n: int) -> None:
    """At a difference of ±1, and at none, one end or both are known in closed form; nothing fails there."""
    z2 = Z**2

    assert pytest.approx(((n - z2) / (n + z2), 1.0)) == tango(n, 0, n=n)[1:]
    assert pytest.approx((-1.0, (z2 - n) / (n + z2))) == tango(0, n, n=n)[1:]
    assert pytest.approx((-z2 / (n + z2), z2 / (n + z2))) == tango(0, 0, n=n)[1:]


def test_tango_ends_are_where_the_score_is_z() -> None:
    """At either end the score statistic, with q maximised numerically, equals ±z."""
    gained, lost, n = 12, 5, 90
    for end, sign in zip(tango(gained, lost, n=n)[1:], (1, -1), strict=True):
        grid = np.linspace(max(0.0, -end) + 1e-9, (1 - end) / 2 - 1e-9, 400_001)
        likelihood = (
            gained * np.log(grid + end)
            + lost * np.log(grid)
            + (n - gained - lost) * np.log1p(-2 * grid - end)
        )
        q = grid[likelihood.argmax()]
        score = (gained - lost - n * end) / np.sqrt(n * (2 * q + end * (1 - end)))
        assert pytest.approx(sign * Z, abs=1e-3) == score


@pytest.mark.parametrize(("n", "gain", "loss"), [(60, 0.03, 0.03), (108, 0.06, 0.02), (200, 0.3, 0.1)])
def test_tango_covers(n: int, gain: float, loss: float) -> None:
    """95 % intervals hold the truth in at least 93 % of 600 repetitions, also with rare discordance."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [gain, loss, 1 - gain - loss], size=600).tolist()
    held = [low <= gain - loss <= high for _, low, high in (tango(g, lo, n=n) for g, lo, _ in draws)]

    assert 0.93 <= np.mean(held)


def test_bootstrap_covers_with_clusters() -> None:
    """At least 90 % of 300 intervals over clusters hold the truth; over examples, far fewer."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 4)
    held, naive = [], []
    for _ in range(300):
        values = rng.normal(size=60)[clusters] + 0.3 * rng.normal(size=240)
        for found, groups in ((held, clusters), (naive, np.arange(240))):
            _, low, high = bootstrap(values, groups)
            found.append(low <= 0 <= high)

    assert 0.9 <= np.mean(held)
    assert 0.75 >= np.mean(naive)


def test_bootstrap_agrees_with_scipys_bca() -> None:
    """Without clusters it is the textbook BCa, up to the noise of the draws."""
    values = np.random.default_rng(2).gamma(1.0, size=150)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, rng=0).confidence_interval

    assert pytest.approx((expected.low, expected.high), abs=0.03) == bootstrap(values, np.arange(150))[1:]


def test_values_without_spread_have_an_interval_without_width() -> None:
    """A constant is known exactly by this data."""
    assert (0.5, 0.5, 0.5) == bootstrap(np.full(10, 0.5), np.arange(10))


def test_one_cluster_tells_nothing_of_the_spread() -> None:
    """Its interval is NaN, and so never clear of zero."""
    found = bootstrap(np.array([0.5, 0.7]), np.array([0, 0]))

    assert np.isnan(found.low)
    assert not found.clear_of_zero


@pytest.mark.parametrize(("count", "least"), [(5, 0.86), (20, 0.91), (60, 0.92)])
def test_bootstrap_covers_small_samples(count: int, least: float) -> None:
    """Of 500 intervals over few normal values, nearly as many hold the truth as are promised."""
    rng = np.random.default_rng(3)
    held = []
    for _ in range(500):
        _, low, high = bootstrap(rng.normal(size=count), np.arange(count))
        held.append(low <= 0 <= high)

    assert least <= np.mean(held)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (3, 3.1824), (10, 2.2281), (120, 1.9799)])
def test_student_s_quantile_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    """The 97.5 % quantile, to the four digits that tables print."""
    assert pytest.approx(quantile, abs=5e-5) == _student(freedom)


@pytest.mark.parametrize(
    ("values", "clusters", "worth"),
    [
        ([1, 0, 1, 0], [0, 1, 2, 3], 4),  # no clusters
        ([1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3], 4),  # alike within clusters: one a cluster
        ([1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2], 6),  # mirrored pairs: no worse than independent
        ([1, 1, 1, 1], [0, 0, 1, 1], 2),  # nothing to be seen of the spread
    ],
)
def test_what_clustered_examples_are_worth(values: list[int], clusters: list[int], worth: float) -> None:
    """Between the number of clusters and that of examples."""
    assert pytest.approx(worth) == effective(np.array(values, float), np.array(clusters))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_accuracy_of_clusters_covers_and_has_width(share: float) -> None:
    """Of 500 intervals over 60 correlated pairs at least 93 % hold the truth, and none is a point."""
    rng = np.random.default_rng(4)
    clusters, held = np.repeat(np.arange(60), 2), []
    for _ in range(500):
        alike = rng.random(60) < 0.5
        both = rng.random((60, 2)) < share
        values = np.where(alike[:, None], both[:, :1], both).reshape(-1).astype(float)
        worth = effective(values, clusters)
        _, low, high = wilson(values.mean() * worth, worth)
        assert low < high
        held.append(low <= share <= high)

    assert 0.93 <= np.mean(held)
