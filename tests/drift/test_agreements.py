"""Agreement over runs: W and p by hand and by scipy, the sign test over runs, and what is no run."""

from collections.abc import Sequence
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import affectlens as al
from affectlens.drift.agreements import Agreement, agreement, contrast_over_runs
from affectlens.errors import NoSuchSite, TableError
from affectlens.stats.ranks import chance, kendall_w, median_interval, sign_test
from tests.small_models import nudge, tiny

ROLES = ("q_proj", "v_proj", "gate_proj", "up_proj")
NORMS = ("frobenius", "rms", "relative", "mean_abs", "max_abs")


def moved(scales: Sequence[float], *, seed: int) -> nn.Module:
    """A tiny llama whose roles moved by noise of these scales."""
    model = tiny("llama")
    for number, (role, scale) in enumerate(zip(ROLES, scales, strict=True)):
        nudge(model, role, scale=scale, seed=100 * seed + number)
    return model


def drifts(*scales: Sequence[float], control: nn.Module | None = None) -> list[al.Drift]:
    """One drift of the tiny llama a row of scales."""
    base = tiny("llama")
    return [
        al.diff(base, moved(row, seed=seed), control=control, progress=False)
        for seed, row in enumerate(scales, 1)
    ]


@pytest.fixture(scope="module")
def three() -> list[al.Drift]:
    """Three seeds, each with the gate moved most."""
    return drifts(*3 * [(0.01, 0.02, 0.08, 0.04)])


@pytest.fixture(scope="module")
def six() -> list[al.Drift]:
    """Six seeds, in the last of which up moved more than the gate."""
    return drifts(*5 * [(0.01, 0.02, 0.08, 0.04)], (0.01, 0.02, 0.04, 0.08))


def test_identical_rankings_agree_fully(three: list[al.Drift]) -> None:
    """Three runs of four groups in one order: W = 1, and p is exactly 1/4!²."""
    found = agreement(three, measure="rms")

    assert 1.0 == found.w
    assert pytest.approx(1 / 24**2) == found.p
    assert (3, 4) == (found.runs, found.origin["groups"])
    assert found.p == found.origin["smallest_p"]
    assert ["gate_proj", "up_proj", "v_proj", "q_proj"] == list(found.frame["role"])
    assert [1.0, 2.0, 3.0, 4.0] == list(found.frame["mean_rank"])
    assert (1.0, 1.0) == (found.origin["spearman_mean"], found.origin["spearman_min"])


def test_the_values_are_those_of_each_drift(three: list[al.Drift]) -> None:
    """Each run keeps its figure a group, aggregated by sums of squares."""
    found = agreement(three).frame.set_index("role")

    for run, drift in enumerate(three):
        expected = drift.by("role").set_index("role")["relative"]
        np.testing.assert_array_equal(expected.loc[found.index], found[f"value_{run}"])


@pytest.mark.parametrize("seed", range(5))
def test_w_with_ties_is_friedmans(seed: int) -> None:
    """W = χ² / (m (n − 1)), of scipy's tie-corrected χ²."""
    values = np.random.default_rng(seed).integers(0, 4, (5, 6)).astype(float)
    ranks = np.array([stats.rankdata(row) for row in values])
    expected = stats.friedmanchisquare(*values.T).statistic / (5 * (6 - 1))

    assert pytest.approx(expected) == kendall_w(ranks)


def test_w_by_hand() -> None:
    """Rank sums 4, 6, 8 lie 8 in squares about their mean: W = 12 · 8 / (3² · (3³ − 3)) = 4/9."""
    ranks = np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])

    assert pytest.approx(4 / 9) == kendall_w(ranks)


def test_opposite_rankings_do_not_agree() -> None:
    """W = 0 and p = 1: whatever is drawn agrees as well."""
    ranks = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])

    assert 0.0 == kendall_w(ranks)
    assert (1.0, 1 / 6, None) == pytest.approx(chance(ranks))


def test_exact_and_drawn_p_are_one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing comes as near as 9,999 draws can, and is the same each time."""
    ranks = np.array([[1.0, 2, 3, 4], [2, 1, 3, 4], [1, 3, 2.5, 2.5]])
    exact, _, draws = chance(ranks)
    monkeypatch.setattr("affectlens.stats.ranks.EXACT", 0)
    drawn, smallest, count = chance(ranks)

    assert (None, 9999, 1e-4) == (draws, count, smallest)
    assert pytest.approx(exact, abs=0.015) == drawn
    assert drawn == chance(ranks)[0]


def test_p_holds_its_level_under_the_null() -> None:
    """Of 1,000 sets of random rankings few have p ≤ .05, and half of them p ≤ .5, as far as ties let."""
    rng = np.random.default_rng(0)
    p = np.array([chance(np.array([rng.permutation(4) + 1.0 for _ in range(3)]))[0] for _ in range(1000)])

    assert 0.02 < (p <= 0.05).mean() < 0.065
    assert 0.4 < (p <= 0.5).mean() < 0.56


def test_many_groups_and_runs_are_drawn() -> None:
    """Eight groups in five runs are too many to enumerate; full agreement has the smallest p there is."""
    p, smallest, draws = chance(np.tile(np.arange(1.0, 9.0), (5, 1)))

    assert (1e-4, 1e-4, 9999) == (p, smallest, draws)


@pytest.mark.parametrize(("larger", "smaller"), [(6, 0), (5, 1), (0, 7), (4, 4), (9, 3)])
def test_the_sign_test_is_exact(larger: int, smaller: int) -> None:
    """It is scipy's binomial test at one half."""
    expected = stats.binomtest(larger, larger + smaller).pvalue

    assert pytest.approx(expected) == sign_test(larger, smaller)


def test_six_that_agree_have_a_p_of_two_in_64() -> None:
    """By hand: both tails of 2⁻⁶."""
    assert pytest.approx(2 / 64) == sign_test(6, 0) == sign_test(0, 6)


def test_five_runs_can_not_be_tested() -> None:
    """1/16 is the smallest p of five, so there is none."""
    assert np.isnan(sign_test(5, 0))
    assert all(np.isnan(median_interval(np.arange(5.0))))


@pytest.mark.parametrize(("count", "k"), [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (70, 27)])
def test_the_interval_of_a_median_is_that_of_the_tables(count: int, k: int) -> None:
    """From the k-th smallest to the k-th largest, k as in the tables; its coverage is 95 % or more."""
    low, high = median_interval(np.arange(1.0, count + 1))

    assert (k, count + 1 - k) == (low, high)
    assert 1 - 2 * sum(comb(count, j) for j in range(k)) / 2**count >= 0.95


def test_the_contrast_counts_runs_and_not_layers(six: list[al.Drift]) -> None:
    """Five of six runs: p is 14/64 under every norm, whatever the number of layers."""
    rows = agreement(six).contrast

    assert list(NORMS) == list(rows["norm"])
    assert {("gate_proj", "up_proj", 6, 5)} == set(
        rows[["first", "second", "runs", "first_larger_runs"]].itertuples(index=False, name=None)
    )
    assert pytest.approx(5 * [14 / 64]) == list(rows["p"])
    assert (rows["low"] < 1).all()
    assert (rows["high"] > 1).all()
    assert rows["control_ratio"].isna().all()


def test_the_contrast_is_the_median_of_the_runs(six: list[al.Drift]) -> None:
    """Ratio and noise are medians over the runs' own medians over layers."""
    each = [drift.contrast("gate_proj", "up_proj").set_index("norm") for drift in six]
    rows = contrast_over_runs(six, first="gate_proj", second="up_proj").set_index("norm")

    for norm in ("frobenius", "relative"):
        assert (
            pytest.approx(np.median([one.loc[norm, "ratio"] for one in each]))
            == rows.loc[norm, "median_ratio"]
        )
        assert pytest.approx(each[0].loc[norm, "noise_ratio"]) == rows.loc[norm, "noise_ratio"]
        assert min(one.loc[norm, "ratio"] for one in each) == rows.loc[norm, "low"]
    assert np.isnan(rows.loc["max_abs", "noise_ratio"])


def test_a_contrast_of_few_runs_is_descriptive(three: list[al.Drift]) -> None:
    """Three runs have neither p nor interval, and a finding says why."""
    found = agreement(three)

    assert found.contrast[["p", "low", "high"]].isna().all(axis=None)
    assert [3] * 5 == list(found.contrast["first_larger_runs"])
    assert "A sign test needs six runs to reach .05, here are 3" in " ".join(found.findings)


def test_a_control_stands_beside_the_contrast() -> None:
    """Where all runs have one its ratio is there, where one lacks it it is not."""
    rows = [(0.01, 0.02, 0.08, 0.04)] * 2
    control = moved((0.01, 0.01, 0.02, 0.08), seed=9)
    beside, without = drifts(*rows, control=control), drifts(*rows)

    ratio = agreement(beside).contrast.set_index("norm")["control_ratio"]

    assert pytest.approx(0.25, rel=0.1) == ratio["rms"]
    assert agreement([beside[0], without[1]]).contrast["control_ratio"].isna().all()


def test_roles_asked_for_have_to_be_there(three: list[al.Drift]) -> None:
    """A model without gates has no contrast; a contrast that was asked for is an error."""
    bare = [al.Drift(drift.frame[drift.frame["role"] != "gate_proj"], drift.origin) for drift in three]

    assert agreement(bare).contrast.empty
    with pytest.raises(NoSuchSite, match="no language layer has role='gate_proj'"):
        agreement(bare, contrast=("gate_proj", "up_proj"))
    assert {"q_proj"} == set(agreement(bare, contrast=("q_proj", "v_proj")).contrast["first"])


def test_noise_alone_agrees_by_a_norm_that_follows_the_base() -> None:
    """Equal noise on all roles ranks by frobenius as their sizes do: W is high, and is said to be noise's."""
    every = drifts(*3 * [(0.01, 0.01, 0.01, 0.01)])
    runs = [drift.where(role=("q_proj", "v_proj", "gate_proj")) for drift in every]

    by_size, by_rms = agreement(runs, measure="frobenius"), agreement(runs, measure="rms")

    assert pytest.approx((1.0, 1.0)) == (by_size.origin["noise_w"], by_size.origin["noise_spearman"])
    assert 1.0 == by_size.w
    assert "agreement alone is not evidence for affect" in by_size.findings[-1]
    assert by_rms.origin["noise_w"] is None
    assert by_rms.frame["noise_rank"].isna().all()


def test_what_a_tuning_could_not_reach_is_not_ranked(three: list[al.Drift]) -> None:
    """An adapter's 'not targeted' is no low rank: it would raise W by design."""
    frame = three[0].frame.assign(targeted=three[0].frame["role"] != "q_proj")
    found = agreement([al.Drift(frame, three[0].origin), *three[1:]])

    assert ["gate_proj", "up_proj", "v_proj"] == list(found.frame["role"])
    assert (
        "1 of 10 groups are not ranked, because not every tuning could reach them: q_proj." in found.findings
    )
    assert any("because no run moved them: " in told and "norm" in told for told in found.findings)


def test_groups_that_a_run_lacks_are_told(three: list[al.Drift]) -> None:
    """Only what every run has is ranked."""
    frame = three[0].frame[three[0].frame["role"] != "up_proj"].reset_index(drop=True)
    found = agreement([al.Drift(frame, three[0].origin), *three[1:]])

    assert "up_proj" not in set(found.frame["role"])
    assert "1 of 10 groups are not ranked, because not every run has them: up_proj." in found.findings


@pytest.mark.parametrize("by", ["layer", "layer,role"])
def test_other_groups_can_be_ranked(by: str, three: list[al.Drift], tmp_path: Path) -> None:
    """Layers too, without what lies in none; their numbers come back from a file as they were."""
    found = agreement(three, by=by)

    assert {0, 1} == set(found.frame["layer"])
    again = Agreement.load(found.save(tmp_path / "layers.csv"))
    pd.testing.assert_frame_equal(found.frame, again.frame, check_dtype=False)


def test_one_pair_is_descriptive(three: list[al.Drift]) -> None:
    """With one run there is nothing to agree."""
    with pytest.raises(TableError, match="got 1: one pair is only descriptive"):
        agreement(three[:1])


def test_one_run_given_twice_is_refused(three: list[al.Drift]) -> None:
    """Under other names it is the same run still."""
    again = al.Drift(three[0].frame.copy(), {"sources": {"base": {"name": "a"}, "tuned": {"name": "b"}}})

    with pytest.raises(TableError, match=r"run 0 .* and run 2 \(a → b\) are equal in every value"):
        agreement([*three[:2], again])


def test_a_run_that_did_not_move_is_refused(three: list[al.Drift]) -> None:
    """It ranks nothing."""
    still = al.diff(tiny("llama"), tiny("llama"), progress=False)

    with pytest.raises(TableError, match=r"run 1 .* did not move at all"):
        agreement([three[0], still])


def test_wrong_asks_are_told(three: list[al.Drift]) -> None:
    """A wrong measure, group or tower names what there is; one group can't be ranked."""
    with pytest.raises(TableError, match="Did you mean 'relative'"):
        agreement(three, measure="relativ")
    with pytest.raises(TableError, match="can't aggregate by 'head'"):
        agreement(three, by="head")
    with pytest.raises(NoSuchSite, match="no row has tower='vision'"):
        agreement(three, tower="vision")
    with pytest.raises(TableError, match="1 groups are left to rank"):
        agreement(three, by="tower", tower=None)


def test_findings_of_each_run_are_carried(three: list[al.Drift]) -> None:
    """What a diff found amiss is told with its run."""
    loud = al.Drift(three[1].frame, {**three[1].origin, "findings": ["Look out."]})
    found = agreement([three[0], loud])

    assert "In run 1 (LlamaForCausalLM → LlamaForCausalLM): Look out." == found.findings[-1]


def test_too_few_runs_for_any_p_are_told(three: list[al.Drift]) -> None:
    """Two runs of three groups can't reach below 1/6, and that is said."""
    found = agreement(three[:2]).origin
    small = [al.Drift(d.frame[d.frame["role"] != "q_proj"], d.origin) for d in three[:2]]

    assert pytest.approx(1 / 24) == found["smallest_p"]
    assert "With so few runs and groups p can't be below 0.17." in agreement(small).findings


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_agreements_come_back_as_they_were(suffix: str, six: list[al.Drift], tmp_path: Path) -> None:
    """Saved and loaded, they have the same ranks, W, p, contrast and sources."""
    found = agreement(six)
    again = Agreement.load(found.save(tmp_path / f"agreement{suffix}"))

    assert dict(found.origin) == dict(again.origin)
    assert (found.w, found.p, found.runs) == (again.w, again.p, again.runs)
    pd.testing.assert_frame_equal(found.frame, again.frame, check_dtype=False)
    pd.testing.assert_frame_equal(found.contrast, again.contrast)
    assert {f"{side} {i}" for side in ("base", "tuned") for i in range(6)} == set(again.origin["sources"])


def test_it_says_w_p_runs_and_groups(three: list[al.Drift]) -> None:
    """In plain text and in HTML alike."""
    found = agreement(three, measure="rms")

    assert "Agreement: W = 1.000, p = 0.0017 over 3 runs and 4 groups (rms by role)" == found.summary
    assert found.summary in repr(found)
    assert "over 3 runs and 4 groups" in found._repr_html_()


def test_runs_keep_their_place_when_dtypes_differ(three: list[al.Drift]) -> None:
    """A run in bfloat16 is a run like any other."""
    half = al.diff(tiny("llama"), moved((0.01, 0.02, 0.08, 0.04), seed=7).to(torch.bfloat16), progress=False)

    assert "gate_proj" == agreement([*three, half]).frame["role"][0]


def test_gates_alone_lead_in_every_run() -> None:
    """Where up stood still the ratio is infinite, in the table as in the file it is saved in."""
    found = agreement(drifts(*3 * [(0.01, 0.02, 0.08, 0.0)]))

    assert [3] * 5 == list(found.contrast["first_larger_runs"])
    assert (found.contrast["median_ratio"] == np.inf).all()


def test_a_role_out_of_reach_has_no_contrast(three: list[al.Drift]) -> None:
    """It is left out, or an error where it was asked for."""
    bare = [
        al.Drift(drift.frame.assign(targeted=drift.frame["role"] != "up_proj"), drift.origin)
        for drift in three
    ]

    assert agreement(bare).contrast.empty
    with pytest.raises(NoSuchSite, match="up_proj was not part of the tuning"):
        agreement(bare, contrast=("gate_proj", "up_proj"))


def test_sites_can_be_ranked(three: list[al.Drift]) -> None:
    """By site there is a group for each that moved."""
    assert 8 == len(agreement(three, by="site"))
