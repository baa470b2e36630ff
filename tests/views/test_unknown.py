"""Unknown values are never shown as facts: nulls, sites out of reach, factors without alpha."""

import re
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import pytest

from affectlens.cli.text import tell_drift
from affectlens.drift.drift import Drift
from affectlens.errors import NoSuchSite, TableError
from affectlens.views import Report, conclude, plot

Drifts = Callable[..., Drift]
ELEMENTWISE = ["mean_abs", "max_abs", "changed", "sign_flips"]
NAN = re.compile(r"\bnan\b", re.IGNORECASE)


def null(drift: Drift, columns: Iterable[str], where: pd.Series | None = None) -> Drift:
    """Set some columns to null, in all rows or some."""
    frame = drift.frame.copy()
    rows = slice(None) if where is None else where
    for name in columns:
        frame[name] = frame[name].astype(float)
        frame.loc[rows, name] = np.nan
    return Drift(frame, drift.origin)


def adapter(drift: Drift) -> Drift:
    """Return a drift as from an adapter: no elementwise measures, k, v and o out of reach."""
    found = null(drift, ELEMENTWISE)
    beyond = found.frame["role"].isin(["k_proj", "v_proj", "o_proj"])
    found.frame.loc[beyond, "targeted"] = False
    found.frame.loc[beyond, ["frobenius", "relative", "rms"]] = 0.0
    return found


def unread(drift: Drift) -> Drift:
    """Return a drift as from equal remote shards: layer 0 did not move, its norms were not read."""
    first = drift.frame["layer"] == 0
    found = null(drift, ["base_norm", "cosine"], first)
    zero = ["frobenius", "relative", "rms", "mean_abs", "max_abs", "changed", "sign_flips"]
    found.frame.loc[first, zero] = 0
    return found


def without_alpha(drift: Drift) -> Drift:
    """Return a drift as from an adapter without alpha: no cosine of base and tuned."""
    return null(adapter(drift), ["cosine"])


def still(drift: Drift) -> Drift:
    """Return the drift of base against itself."""
    frame = drift.frame.copy()
    frame[["frobenius", "relative", "rms", "mean_abs", "max_abs", "changed", "sign_flips"]] = 0
    return Drift(frame, drift.origin)


def beyond_reach(drift: Drift) -> Drift:
    """Return a drift in which the tuning could reach nothing."""
    found = still(drift)
    found.frame["targeted"] = False
    return found


def with_arrays(drift: Drift) -> Drift:
    """Return a drift with arrays (neurons, singular values) in some cells and nulls in the others."""
    frame = drift.frame.copy()
    neurons = frame["role"].isin(["gate_proj", "up_proj", "down_proj"])
    frame["unit"] = np.where(neurons, "neuron", None)
    for name in ("unit_frobenius", "unit_base_norm", "singular_values"):
        arrays = [np.arange(1.0, 9.0, dtype=np.float32) if one else None for one in neurons]
        frame[name] = pd.Series(arrays, dtype=object)
    return Drift(frame, drift.origin)


MADE = [adapter, unread, without_alpha, still, beyond_reach, with_arrays]


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("made", MADE)
def test_nothing_says_nan(made: Callable[[Drift], Drift], make_drift: Drifts, control: bool) -> None:
    """Reprs, notebook, terminal, sentences and report never print nan, whatever is unknown."""
    drift = made(make_drift(control=control))
    report = re.sub(r"<script.*?</script>", "", Report(drift).html, flags=re.DOTALL)
    said = [repr(drift), drift._repr_html_(), *tell_drift(drift), *tell_drift(drift, "layer,role")]

    for text in (*said, str(conclude(drift)), report):
        assert not NAN.search(text), text


@pytest.mark.parametrize("kind", ["map", "roles", "contrast"])
@pytest.mark.parametrize("made", [adapter, unread, without_alpha, with_arrays])
def test_every_figure_is_drawn(made: Callable[[Drift], Drift], make_drift: Drifts, kind: str) -> None:
    """Every figure can be drawn with nulls, which leave gaps."""
    assert plot(made(make_drift()), kind).figure.data


def test_out_of_reach_is_not_standing_still(make_drift: Drifts) -> None:
    """Groups out of reach are counted apart from groups that did not move."""
    drift = adapter(make_drift())
    drift.frame.loc[drift.frame["role"] == "q_proj", ["frobenius", "relative", "rms"]] = 0.0
    heading = next(line for line in tell_drift(drift) if line.startswith("How far"))

    assert heading.endswith("(1 group did not, 3 could not: the tuning does not reach them)")


def test_a_tuning_elsewhere_is_said_to_be_elsewhere(make_drift: Drifts) -> None:
    """If all weights were out of reach, that they did not move is reported as no finding."""
    said = conclude(beyond_reach(make_drift())).may_not

    assert any(words.startswith("The tuning could not reach any attention") for words in said)
    assert not any("did not move at all" in words for words in said)


def test_unknown_norms_are_named_as_unknown(make_drift: Drifts) -> None:
    """'Under every norm' is said only if all five are known."""
    scale = {"gate_proj": 2.0}
    known, few = (conclude(made(make_drift(scale=scale))) for made in (with_arrays, adapter))

    assert any("more than up_proj under every norm" in words for words in known.may)
    assert any("by ‖Δ‖, rms and ‖Δ‖/‖W‖ (the other norms are unknown)" in words for words in few.may)


def test_without_alpha_sizes_are_not_stated(make_drift: Drifts) -> None:
    """Without alpha a sentence gives ratios, in which the unknown factor cancels, and no sizes."""
    words = next(
        one for one in conclude(without_alpha(make_drift(scale={"q_proj": 3.0}))).may if "By rms" in one
    )

    assert "By rms, q_proj moved most (3 times as far as gate_proj, the next)." == words


def test_a_ratio_over_some_sites_says_so(make_drift: Drifts) -> None:
    """If some norms were not read, terminal, sentences and report say how many were."""
    drift = unread(make_drift())

    assert any("read at 21 of these 28 sites" in words for words in conclude(drift).may_not)
    assert any(line.startswith("norms_known: ") for line in tell_drift(drift))
    assert "3 sites" in Report(drift).html


def test_noise_runs_over_the_sites_that_the_ratio_runs_over(make_drift: Drifts) -> None:
    """With equal rms at every site whose norm is known, the bars end at the noise line."""
    drawn = plot(unread(make_drift()), "roles").figure.data
    traces = {trace.name: list(trace.y) for trace in drawn if trace.xaxis == "x"}

    assert traces["iid noise, equal rms"] == pytest.approx(traces["tuned − base"])


def test_a_contrast_needs_two_roles_within_reach(make_drift: Drifts) -> None:
    """A gate out of reach is not said to have moved less, and the contrast is an error."""
    drift = make_drift()
    drift.frame.loc[drift.frame["role"] == "gate_proj", "targeted"] = False

    assert not any("gate_proj did not move" in words for words in conclude(drift).may)
    with pytest.raises(NoSuchSite, match="gate_proj"):
        _ = plot(drift, "contrast").figure


def test_a_measure_that_is_null_throughout_can_not_be_mapped(make_drift: Drifts) -> None:
    """A measure that is null within reach is an error, even with zeros out of reach."""
    drift = adapter(make_drift())
    drift.frame.loc[~drift.frame["targeted"], "mean_abs"] = 0.0

    with pytest.raises(TableError, match="'mean_abs' was not measured where the tuning could reach"):
        _ = plot(drift, measure="mean_abs").figure


def test_the_angle_to_the_control_is_no_map_of_the_control(make_drift: Drifts) -> None:
    """`control_cosine` is the angle of the two changes, so it makes no panel beside the cosine of weights."""
    drift = make_drift()
    drift.frame["control_along"] = 0.0
    drift.frame["control_residual"] = drift.frame["frobenius"]

    assert 1 == len(plot(drift, measure="cosine").figure.data)
    assert 2 == len(plot(drift, measure="rms").figure.data)


def test_rounding_that_is_much_of_the_drift_is_told(make_drift: Drifts) -> None:
    """Much rounding appears in the role table, the sentences and the report, as a share of ‖Δ‖²."""
    drift = make_drift()
    drift.frame["rounding"] = 0.5 * drift.frame["frobenius"].where(drift.frame["role"] == "q_proj", 0.0)
    lines = tell_drift(drift)

    assert any(line.split()[1] == "q_proj" and " 25% " in line for line in lines if line.strip())
    assert any("explains 25\N{NO-BREAK SPACE}% (q_proj)" in words for words in conclude(drift).may_not)
    assert "from casting (%)" in Report(drift).html


def test_little_rounding_takes_no_column(make_drift: Drifts) -> None:
    """Below a tenth of ‖Δ‖², rounding gets no column."""
    drift = make_drift()
    drift.frame["rounding"] = 0.1 * drift.frame["frobenius"]

    assert not any("rounding" in line for line in tell_drift(drift))


def test_the_role_table_has_the_control_and_the_part_along_it(make_drift: Drifts) -> None:
    """The columns `control` and `along` are shown, and explained under the table."""
    drift = make_drift()
    drift.frame["control_along"] = 0.5 * drift.frame["frobenius"]
    drift.frame["control_residual"] = drift.frame["frobenius"]
    lines = tell_drift(drift)

    assert any(line.endswith("control  along") for line in lines)
    assert any(line.endswith(" 50%") for line in lines)
    assert {"control", "along"} <= {line.partition(":")[0] for line in lines}


@pytest.mark.parametrize(("after", "columns"), [(1.0, 0), (0.5, 1)])
def test_alignment_takes_a_column_where_it_changes_something(
    make_drift: Drifts, after: float, columns: int
) -> None:
    """Alignment gets a column only if it changes a number."""
    drift = make_drift()
    drift.frame["aligned_frobenius"] = after * drift.frame["frobenius"]

    assert columns == sum(line.startswith("aligned: ") for line in tell_drift(drift))
    assert bool(columns) == ("neurons matched" in Report(drift).html)


def test_findings_are_printed_in_full_before_the_figures(make_drift: Drifts) -> None:
    """A long finding is printed in full, wrapped, without control characters."""
    finding = "The weights " + "of some site " * 30 + "\x1b[31m end."
    lines = tell_drift(make_drift(findings=[finding]))
    said = " ".join(line.strip() for line in lines[: lines.index("")])

    assert finding.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in said
    assert all(100 >= len(line) for line in lines)


def test_the_report_explains_each_state_of_the_ledger(make_drift: Drifts) -> None:
    """The notes of the ledger appear on the terminal and in the report."""
    note = "not part of the adapter: could not move"
    row = {"state": "not-targeted", "sites": 1, "base_parameters": 2, "tuned_parameters": 2, "note": note}
    drift = make_drift(ledger=[row])

    assert any(note in line for line in tell_drift(drift))
    assert note in Report(drift).html


def test_neurons_are_drawn_sorted_by_role_and_layer(make_drift: Drifts) -> None:
    """There is one curve a layer for gate, up and down, with the largest drift first."""
    drift = with_arrays(make_drift(layers=3))
    row = drift.frame["unit"] == "neuron"
    drift.frame.loc[row, "unit_base_norm"] = pd.Series([np.full(8, 2.0)] * len(drift.frame))[row]
    curves = [trace for trace in plot(drift, "neurons").figure.data if trace.mode == "lines"]

    assert 9 == len(curves)
    assert [400.0, 50.0] == pytest.approx([curves[0].y[0], curves[0].y[-1]])
    assert list(curves[0].y) == sorted(curves[0].y, reverse=True)


def test_neurons_need_a_drift_with_neurons(make_drift: Drifts) -> None:
    """The error names the option to diff with."""
    with pytest.raises(NoSuchSite, match="detail='neurons'"):
        _ = plot(make_drift(), "neurons").figure
