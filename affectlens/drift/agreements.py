"""Test whether several tunings rank their groups alike; the unit is the run, never the layer.

Runs can agree without any affect: ‖Δ‖/‖W‖ mostly follows 1/‖W‖, which tunings of one base share. So
Kendall's W is reported beside the ranking that iid noise of one rms would give.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from affectlens.drift.drift import Drift
from affectlens.drift.groups import KEYS, NORMS, parsed
from affectlens.errors import NoSuchSite, TableError, near
from affectlens.printable import plain
from affectlens.stats.ranks import (
    FEWEST,
    SEED,
    chance,
    kendall_w,
    median_interval,
    sign_test,
    spearman,
)
from affectlens.table import Table, provenance
from affectlens.table_formats import records

GATE_UP = ("gate_proj", "up_proj")
_NUMBERS = ("median_ratio", "low", "high", "p", "noise_ratio", "control_ratio")
_CONTRAST = ("first", "second", "norm", "runs", "first_larger_runs", *_NUMBERS)


@dataclass(frozen=True, repr=False)
class Agreement(Table):
    """How alike several tunings rank the groups they move; made by `affectlens.agreement`.

    One row a group, the farthest moved first: the columns it was grouped by, `mean_rank` (1 = moved
    farthest), `noise_rank` (mean rank if Δ were iid noise of one rms; null where noise has no
    ranking), `median` of the measure over runs, and for each run `value_0 value_1 …` and
    `rank_0 rank_1 …`. The origin has `kendall_w p smallest_p draws`, Spearman's ρ between two runs
    (`spearman_mean spearman_min`), and for the noise `noise_w` and its ρ with the runs, `noise_spearman`.

    >>> import affectlens as al
    >>> base, tuned, control, _ = al.load_demo()
    >>> runs = [al.diff(base, side, progress=False) for side in (tuned, control)]
    >>> found = al.agreement(runs)
    >>> found.runs, round(found.w, 2), round(found.p, 2)
    (2, 0.55, 0.42)
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
        """The share of rankings, shuffled within each run, that agree as well or better."""
        return float(self.origin["p"])

    @property
    def runs(self) -> int:
        """The number of base/tuned pairs."""
        return int(self.origin["runs"])

    @property
    def findings(self) -> tuple[str, ...]:
        """Sentences a reader must not overlook, such as groups left out and the agreement of mere noise."""
        return tuple(self.origin.get("findings", ()))

    @property
    def contrast(self) -> pd.DataFrame:
        """The rows of `contrast_over_runs`, one a norm; empty where not every run has both roles."""
        rows = pd.DataFrame(self.origin.get("contrast", []), columns=list(_CONTRAST))
        return rows.astype(dict.fromkeys(_NUMBERS, float))

    @property
    def summary(self) -> str:
        """One line: W and p, the numbers of runs and groups, and the agreement of mere noise."""
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
    """Measure how alike several base/tuned pairs rank their groups, and test it over runs.

    `drifts` has one `Drift` a run: a seed, a tuning, a model; epochs of one training are not runs (see
    `affectlens.trajectory`). `by` is as in `Drift.by`, `measure` one of `frobenius rms relative mean_abs
    max_abs`; `tower=None` takes all towers. Groups are ranked if every tuning could reach them and at
    least one moved them; `findings` lists the others. W is Kendall and Babington Smith's (1939, Ann. Math.
    Stat. 10); `p` is by permutation within runs, exact where they are few, else from 9,999 seeded draws.
    `contrast` names two roles (gate_proj and up_proj by default). Raises `TableError` for fewer than two
    runs, a run given twice, a run that did not move, and where fewer than two groups are left.

    >>> import affectlens as al
    >>> base, tuned, control, _ = al.load_demo()
    >>> runs = [al.diff(base, side, progress=False) for side in (tuned, control)]
    >>> al.agreement(runs, by="layer").frame[["layer", "mean_rank", "noise_rank"]]
       layer  mean_rank  noise_rank
    0      0        1.0         4.0
    1      1        2.0         3.0
    2      2        3.0         2.0
    3      3        4.0         1.0

    """
    if len(drifts) < 2:
        raise TableError(f"agreement needs two runs or more, got {len(drifts)}: one pair is only descriptive")
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
    """Compare two roles over runs: each run counts once, by the median of first/second over its layers.

    Returns one row a norm: `first second norm runs first_larger_runs median_ratio low high p noise_ratio
    control_ratio`. `low..high` is the order-statistic interval of the median (≥ 95 %, distribution-free),
    `p` the exact two-sided sign test against 1, without ratios of exactly 1. Both are null below six runs,
    where no p can reach .05. `noise_ratio` is that of iid noise of one rms: where it is on the same side
    of 1, a small `p` is no evidence for affect. `control_ratio` is null unless every run has a control.
    Raises `NoSuchSite` for a role that a run lacks or could not reach.
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


def _refuse_repeats(drifts: Sequence[Drift]) -> None:
    # Compare values: the header hash of a source is the same for every tuning of one base.
    for i, drift in enumerate(drifts):
        if not (drift.frame["frobenius"] > 0).any():
            raise TableError(f"{_run(i, drift)} did not move at all, so it has no ranking. Leave it out")
    keys = ["parameter", "label", "expert", "frobenius", "cosine"]
    values = [drift.frame[keys].astype(object) for drift in drifts]
    for i, j in combinations(range(len(drifts)), 2):
        if values[i].equals(values[j]):
            both = f"{_run(i, drifts[i])} and {_run(j, drifts[j])}"
            raise TableError(f"{both} are equal in every value: give each run once")


def _grouped(drift: Drift, names: list[str], measure: str) -> pd.DataFrame:
    rows = drift.by(*names).dropna(subset=names)  # sites without a layer don't belong in a ranking of layers
    root = np.sqrt(rows["size"].astype(float))
    noise = {"frobenius": root, "relative": root / rows["base_norm"].where(rows["base_norm"] > 0)}
    # Noise ties all groups by rms and mean_abs, and its max_abs is unknown: it has no ranking there.
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
            told.append(f"{len(gone)} of {len(index)} groups are not ranked, because {reason}: {few}.")
        keep &= ~mask
    if keep.sum() < 2:
        raise TableError(f"{keep.sum()} groups are left to rank, but agreement needs two. {' '.join(told)}")
    return index[keep], told


def _tested(values: pd.DataFrame, noise: pd.DataFrame) -> dict[str, Any]:
    ranks, others = values.to_numpy(dtype=float).T, noise.to_numpy(dtype=float).T
    p, smallest, draws = chance(ranks)
    between = [spearman(one, two) for one, two in combinations(ranks, 2)]
    found = {
        "kendall_w": kendall_w(ranks),
        "p": p,
        "smallest_p": smallest,
        "draws": draws,
        "spearman_mean": float(np.mean(between)),
        "spearman_min": float(np.min(between)),
        "noise_w": kendall_w(others) if np.isfinite(others).all() else np.nan,
        "noise_spearman": float(np.mean([spearman(*pair) for pair in zip(ranks, others, strict=True)])),
    }
    return {name: None if value != value else value for name, value in found.items()}


def _contrasted(drifts: Sequence[Drift], roles: tuple[str, str] | None) -> list[dict[str, Any]]:
    first, second = roles or GATE_UP
    # A model without gates is an error only if the caller asked for its gates.
    with suppress(*([] if roles else [NoSuchSite])):
        rows = contrast_over_runs(drifts, first=first, second=second).astype(object)
        return records(rows.replace(np.inf, "inf"))  # JSON has no infinity
    return []


def _framed(values: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    ranks = values.rank(ascending=False)
    beside = noise.rank(ascending=False).mean(axis=1, skipna=False)
    named = {"mean_rank": ranks.mean(axis=1), "noise_rank": beside, "median": values.median(axis=1)}
    found = pd.DataFrame(named).join(values.add_prefix("value_")).join(ranks.add_prefix("rank_"))
    return found.sort_values("mean_rank", kind="stable").reset_index()


def _told(tested: dict[str, Any], measure: str, runs: int) -> Iterator[str]:
    if tested["smallest_p"] > 0.05:
        yield f"With so few runs and groups p can't be below {tested['smallest_p']:.2g}."
    if runs < FEWEST:
        yield (
            f"A sign test needs six runs to reach .05, here are {runs}: the contrast of roles is only "
            "descriptive."
        )
    if tested["noise_spearman"] is not None:
        yield (
            f"By {measure}, iid noise of one rms ranks the groups too: its W is {tested['noise_w']:.2f}, its "
            f"ρ with the runs {tested['noise_spearman']:.2f}. So agreement alone is not evidence for affect."
        )


def _run(number: int, drift: Drift) -> str:
    sides = [plain(drift.origin["sources"][side].get("name", "?")) for side in ("base", "tuned")]
    return f"run {number} ({' → '.join(sides)})"
