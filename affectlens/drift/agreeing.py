"""Do several tunings move the same groups? Here the run is the unit, never the layer.

Runs can agree for a reason that is no affect: ‖Δ‖/‖W‖ mostly follows 1/‖W‖, which tunings of one base
share. So beside Kendall's W stands the ranking that iid noise of one rms would give.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, permutations
from math import factorial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import binomtest, quantile_test, spearmanr

from affectlens.drift.aggregating import KEYS, parsed
from affectlens.drift.contrasting import NORMS
from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite, TableError, near
from affectlens.formats import records
from affectlens.html import plain
from affectlens.table import Table, provenance

GATE_UP = ("gate_proj", "up_proj")
DRAWS, SEED = 9_999, 0
EXACT = 20_000  # up to so many arrangements are enumerated rather than drawn from
FEWEST = 6  # runs: with five that all agree, a two-sided sign test still gives 1/16

_NUMBERS = ("median_ratio", "low", "high", "p", "noise_ratio", "control_ratio")
_CONTRAST = ("first", "second", "norm", "runs", "first_larger_runs", *_NUMBERS)


@dataclass(frozen=True, repr=False)
class Agreement(Table):
    """How alike several tunings rank the groups they move; made by `affectlens.agreement`.

    One row a group, the farthest moved first: the columns it was grouped by, `mean_rank` (1 = moved
    farthest), `noise_rank` (mean rank if Δ were iid noise of one rms; null where noise has no
    ranking), `median` of the measure over runs, and of each run its `value_0 value_1 …` and
    `rank_0 rank_1 …`. The origin has `kendall_w p smallest_p draws`, Spearman's ρ between two runs
    (`spearman_mean spearman_min`), and of the noise `noise_w` and its ρ with the runs, `noise_spearman`.
    """

    schema: ClassVar[str] = "affectlens.agreement/1"
    rank: ClassVar[str] = "median"
    shown: ClassVar[tuple[str, ...]] = (*KEYS, "mean_rank", "noise_rank", "median")

    @property
    def w(self) -> float:
        """Kendall's W, corrected for ties: 1 when all runs rank alike, about 1/runs by chance."""
        return float(self.origin["kendall_w"])

    @property
    def p(self) -> float:
        """How often rankings shuffled within each run agree as well or better."""
        return float(self.origin["p"])

    @property
    def runs(self) -> int:
        """The number of base/tuned pairs."""
        return int(self.origin["runs"])

    @property
    def findings(self) -> tuple[str, ...]:
        """What must not be overlooked, such as groups left out and what noise alone would do."""
        return tuple(self.origin.get("findings", ()))

    @property
    def contrast(self) -> pd.DataFrame:
        """What `contrast_over_runs` gave, one row a norm; empty where not every run has both roles."""
        rows = pd.DataFrame(self.origin.get("contrast", []), columns=list(_CONTRAST))
        return rows.astype(dict.fromkeys(_NUMBERS, float))

    @property
    def summary(self) -> str:
        """One line: W and p, over how many runs and groups, and what noise alone would do."""
        said = self.origin
        noise = said.get("noise_spearman")
        return (
            f"Agreement: W = {self.w:.3f}, p = {self.p:.2g} over {self.runs} runs and {said['groups']} "
            f"groups ({said['measure']} by {said['by']})"
            + ("" if noise is None else f"; noise alone would rank like the runs with ρ = {noise:.2f}")
        )


def agreement(
    drifts: Sequence[Drift],
    *,
    by: str = "role",
    measure: str = "relative",
    tower: str | None = "language",
    contrast: tuple[str, str] | None = None,
) -> Agreement:
    """Say how alike several base/tuned pairs rank their groups, and test it over runs.

    `drifts` has one `Drift` a run: a seed, a tuning, a model; epochs of one training are not runs (see
    `affectlens.trajectory`). `by` is as in `Drift.by`, `measure` one of `frobenius rms relative mean_abs
    max_abs`, `tower=None` takes all towers. Ranked are the groups that every tuning could reach and one
    moved; `findings` tells what was left out. W is Kendall and Babington Smith's (1939, Ann. Math. Stat.
    10); `p` is by permutation within runs, exact where they are few, else of 9,999 seeded draws.
    `contrast` names two roles (gate_proj and up_proj by default). Raises `TableError` for fewer than two
    runs, one given twice, one that did not move, and where fewer than two groups are left.
    """
    if len(drifts) < 2:
        raise TableError(f"one pair is descriptive: agreement needs two runs or more, got {len(drifts)}")
    if measure not in NORMS:
        raise TableError(f"can't rank by {measure!r}. Measures: {near(measure, NORMS)}")
    chosen = [drift if tower is None else drift.where(tower=tower) for drift in drifts]
    _refuse_repeats(chosen)
    each = [_grouped(drift, parsed([by], KEYS), measure) for drift in chosen]
    index, left_out = _common(each)
    values, noise = (_by_run(each, index, column) for column in ("value", "noise"))
    tested = _tested(values.rank(ascending=False), noise.rank(ascending=False))
    carried = (f"In {_run(i, d)}: {finding}" for i, d in enumerate(drifts) for finding in d.findings)
    sides = ((f"{side} {i}", s) for i, d in enumerate(drifts) for side, s in d.origin["sources"].items())
    origin = {
        "sources": dict(sides),
        **provenance(),
        "by": by,
        "measure": measure,
        "tower": tower,
        "seed": SEED,
        "runs": len(drifts),
        "groups": len(index),
        **tested,
        "contrast": _contrasted(drifts, contrast),
        "findings": [*left_out, *_told(tested, measure, len(drifts)), *carried],
    }
    return Agreement(_framed(values, noise), origin)


def contrast_over_runs(drifts: Sequence[Drift], *, first: str, second: str) -> pd.DataFrame:
    """Compare two roles over runs: a run counts once, by the median over its layers of first/second.

    Returns one row a norm: `first second norm runs first_larger_runs median_ratio low high p noise_ratio
    control_ratio`. `low..high` is the order-statistic interval of the median (≥ 95 %, distribution-free),
    `p` the exact two-sided sign test against 1, without ratios of exactly 1. Both are null below six runs,
    where no p can reach .05. `noise_ratio` is what iid noise of one rms gives: where it lies on the same
    side of 1, a small `p` is no evidence for affect. `control_ratio` is null unless every run has a
    control. Raises `NoSuchSite` for a role that a run lacks or could not reach.
    """
    each = pd.concat([drift.contrast(first, second) for drift in drifts], ignore_index=True)
    each = each.reindex(columns=["norm", "ratio", "noise_ratio", "control_ratio"])
    rows = []
    for norm, runs in each.groupby("norm", sort=False):
        ratio = runs["ratio"].dropna().to_numpy(dtype=float)
        more, less = int((ratio > 1).sum()), int((ratio < 1).sum())
        found = (len(ratio), more, runs["ratio"].median(), *median_interval(ratio), sign_test(more, less))
        beside = (runs["noise_ratio"].median(), runs["control_ratio"].astype(float).median(skipna=False))
        rows.append(dict(zip(_CONTRAST, (first, second, norm, *found, *beside), strict=True)))
    return pd.DataFrame(rows, columns=list(_CONTRAST)).astype(dict.fromkeys(_NUMBERS, float))


def kendall_w(ranks: Float[np.ndarray, "runs groups"]) -> float:
    """Kendall's coefficient of concordance, corrected for ties; NaN where every run ties all groups."""
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
    # without rounding. When enumerating, one run may stay as it is: only how the others lie to it matters.
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
    """The p of the exact two-sided sign test; NaN below six runs, where none can reach .05."""
    runs = larger + smaller
    return float(binomtest(larger, runs).pvalue) if runs >= FEWEST else np.nan


def median_interval(values: Float[np.ndarray, " runs"]) -> tuple[float, float]:
    """The distribution-free interval of the median that covers in 95 % or more; NaN below six values."""
    if len(values) < FEWEST:
        return np.nan, np.nan
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return float(low), float(high)


def _refuse_repeats(drifts: Sequence[Drift]) -> None:
    # By values: the header hash of a source is the same for every tuning of one base.
    for i, drift in enumerate(drifts):
        if not (drift.frame["frobenius"] > 0).any():
            raise TableError(f"{_run(i, drift)} did not move at all, so it ranks nothing")
    keys = ["parameter", "label", "expert", "frobenius", "cosine"]
    values = [drift.frame[keys].astype(object) for drift in drifts]
    for i, j in combinations(range(len(drifts)), 2):
        if values[i].equals(values[j]):
            both = f"{_run(i, drifts[i])} and {_run(j, drifts[j])}"
            raise TableError(f"{both} are equal in every value: one run given twice is no replication")


def _grouped(drift: Drift, names: list[str], measure: str) -> pd.DataFrame:
    rows = drift.by(*names).dropna(subset=names)  # what has no layer is no group of a ranking of layers
    root = np.sqrt(rows["size"].astype(float))
    noise = {"frobenius": root, "relative": root / rows["base_norm"].where(rows["base_norm"] > 0)}
    # By rms and mean_abs noise ties all groups, and its max_abs is not known: no ranking to compare with.
    found = rows[names].assign(value=rows[measure].astype(float), noise=noise.get(measure, np.nan))
    return found.assign(reached=rows["targeted"] > 0).set_index(names)


def _by_run(each: Sequence[pd.DataFrame], index: pd.Index, column: str) -> pd.DataFrame:
    return pd.concat([rows[column].reindex(index) for rows in each], axis=1, keys=range(len(each)))


def _common(each: Sequence[pd.DataFrame]) -> tuple[pd.Index, list[str]]:
    index = pd.concat(each, axis=1).index
    values, reached = (_by_run(each, index, column) for column in ("value", "reached"))
    masks = {
        "not every tuning could reach them": reached.eq(False).any(axis=1),
        "not every run has them": values.isna().any(axis=1),
        "no run moved them": values.eq(0).all(axis=1),
    }
    keep, told = pd.Series(True, index=index), []
    for reason, mask in masks.items():
        if gone := [".".join(map(str, np.atleast_1d(group))) for group in index[mask & keep]]:
            few = plain(", ".join(gone))
            told.append(f"{len(gone)} of {len(index)} groups are not ranked, for {reason}: {few}.")
        keep &= ~mask
    if keep.sum() < 2:
        raise TableError(f"{keep.sum()} groups are left to rank, two are needed. {' '.join(told)}")
    return index[keep], told


def _tested(values: pd.DataFrame, noise: pd.DataFrame) -> dict[str, Any]:
    ranks, others = values.to_numpy(dtype=float).T, noise.to_numpy(dtype=float).T
    p, smallest, draws = chance(ranks)
    between = [_spearman(one, two) for one, two in combinations(ranks, 2)]
    found = {
        "kendall_w": kendall_w(ranks),
        "p": p,
        "smallest_p": smallest,
        "draws": draws,
        "spearman_mean": float(np.mean(between)),
        "spearman_min": float(np.min(between)),
        "noise_w": kendall_w(others) if np.isfinite(others).all() else np.nan,
        "noise_spearman": float(np.mean([_spearman(*pair) for pair in zip(ranks, others, strict=True)])),
    }
    return {name: None if value != value else value for name, value in found.items()}


def _spearman(one: np.ndarray, two: np.ndarray) -> float:
    known = np.isfinite(one).all() and np.isfinite(two).all() and np.ptp(one) and np.ptp(two)
    return float(spearmanr(one, two).statistic) if known else np.nan  # it warns of a constant side


def _contrasted(drifts: Sequence[Drift], roles: tuple[str, str] | None) -> list[dict[str, Any]]:
    first, second = roles or GATE_UP
    # A model without gates is no error unless its gates were asked for.
    with suppress(*([] if roles else [NoSuchSite])):
        rows = contrast_over_runs(drifts, first=first, second=second).astype(object)
        return records(rows.replace(np.inf, "inf"))  # JSON has no number for it
    return []


def _framed(values: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    ranks = values.rank(ascending=False)
    beside = noise.rank(ascending=False).mean(axis=1, skipna=False)
    named = {"mean_rank": ranks.mean(axis=1), "noise_rank": beside, "median": values.median(axis=1)}
    found = pd.DataFrame(named).join(values.add_prefix("value_")).join(ranks.add_prefix("rank_"))
    return found.sort_values("mean_rank", kind="stable").reset_index()


def _told(tested: dict[str, Any], measure: str, runs: int) -> Iterator[str]:
    if tested["smallest_p"] > 0.05:
        yield f"No p below {tested['smallest_p']:.2g} can come out of so few runs and groups."
    if runs < FEWEST:
        yield f"No sign test of {runs} runs can reach .05 (six can): the contrast of roles is descriptive."
    if tested["noise_spearman"] is not None:
        yield (
            f"By {measure}, iid noise of one rms ranks the groups too: its W is {tested['noise_w']:.2f}, its "
            f"ρ with the runs {tested['noise_spearman']:.2f}. Agreement alone is no evidence for affect."
        )


def _run(number: int, drift: Drift) -> str:
    sides = [plain(drift.origin["sources"][side].get("name", "?")) for side in ("base", "tuned")]
    return f"run {number} ({' → '.join(sides)})"
