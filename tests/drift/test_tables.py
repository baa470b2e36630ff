"""Tables of a drift: contrasts where one role stood still, groups of every kind, what a repr says first."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import affectlens as al
from affectlens.drift.groups import aggregate, contrast
from affectlens.errors import NoSuchSite, TableError
from affectlens.views.figures.norms import norm_contrast
from affectlens.views.sentences.conclusions import conclude
from tests.small_models import nudge, tiny

GATE_UP = ("gate_proj", "up_proj")
MEASURES = ("frobenius", "rms", "relative", "mean_abs", "max_abs")


def row(role: str, layer: int, delta: float, **other: object) -> dict[str, object]:
    """A site of ten elements, each moved by `delta` from 1."""
    root = np.sqrt(10.0)
    return {
        "parameter": f"layers.{layer}.{role}.weight", "tower": "language", "stack": None, "layer": layer,
        "role": role, "expert": None, "param": "weight", "label": "", "size": 10, "dtype": "float32",
        "frobenius": delta * root, "base_norm": root, "relative": delta, "rms": delta, "mean_abs": delta,
        "max_abs": delta, "cosine": 1.0, "changed": 10, "sign_flips": 0, "nonfinite": 0, "rounding": 0.0,
        "targeted": True, **other,
    }  # fmt: skip


def drift_of(*rows: dict[str, object], **origin: object) -> al.Drift:
    """A drift of these rows."""
    frame = pd.DataFrame(list(rows)).astype({"layer": "Int64", "expert": "Int64"})
    return al.Drift(frame, {"sources": {"base": {"name": "b"}, "tuned": {"name": "t"}}, **origin})


def contrasted(*rows: dict[str, object]) -> pd.DataFrame:
    """The contrast of gate and up, by norm."""
    return drift_of(*rows).contrast(*GATE_UP).set_index("norm")


@pytest.fixture(scope="module")
def gates() -> al.Drift:
    """A whole checkpoint in which the gates alone moved."""
    return al.diff(tiny("llama"), nudge(tiny("llama"), "gate_proj"), progress=False)


@pytest.fixture(scope="module")
def units() -> al.Drift:
    """Heads and neurons of a tiny llama: two layers, 4 heads, 2 of k and v, 48 neurons."""
    return al.diff(tiny("llama"), nudge(tiny("llama"), "layers"), detail="heads,neurons", progress=False)


def test_gates_alone_are_larger_in_every_layer(gates: al.Drift) -> None:
    """Where up stood still the ratio is infinite under every norm, and counts as larger."""
    rows = gates.contrast(*GATE_UP).set_index("norm")

    assert {2} == set(rows["layers"]) | set(rows["layers_known"]) | set(rows["first_larger"])
    assert (rows["ratio"] == np.inf).all()
    assert rows["noise_ratio"].drop("max_abs").notna().all()
    assert rows.loc["max_abs", ["noise_ratio", "noise_larger"]].isna().all()


def test_nothing_over_nothing_is_null() -> None:
    """0/0 has no ratio and x/0 an infinite one; the median is over the layers that have one."""
    both = [row("gate_proj", 0, 0.0), row("up_proj", 0, 0.0)]
    rows = contrasted(*both, row("gate_proj", 1, 0.2), row("up_proj", 1, 0.1))

    assert (2, 1, pytest.approx(2.0)) == tuple(rows.loc["rms", ["layers_known", "first_larger", "ratio"]])
    assert np.isnan(contrasted(*both).loc["rms", "ratio"])
    assert 0 == contrasted(*both).loc["rms", "first_larger"]


def test_all_figures_of_a_norm_run_over_the_same_layers() -> None:
    """A layer that the control lacks counts neither for the tuning nor for noise."""
    known = {f"control_{norm}": 0.1 for norm in MEASURES}
    lacking = dict.fromkeys(known, np.nan)
    rows = contrasted(
        row("gate_proj", 0, 0.2, **known), row("up_proj", 0, 0.1, **known),
        row("gate_proj", 1, 0.9, **lacking), row("up_proj", 1, 0.1, **known),
    )  # fmt: skip

    assert {1} == set(rows["layers_known"])
    assert pytest.approx(2.0) == rows.loc["rms", "ratio"]
    assert pytest.approx(1.0) == rows.loc["rms", "control_ratio"]


def test_a_role_out_of_reach_is_no_rival() -> None:
    """A LoRA on the gates alone says nothing of up; where some layers were reached, these count."""
    alone = [row("gate_proj", 0, 0.2), row("up_proj", 0, 0.0, targeted=False)]

    with pytest.raises(NoSuchSite, match="up_proj was not part of the tuning: not targeted, so it could not"):
        contrasted(*alone)

    rows = contrasted(*alone, row("gate_proj", 1, 0.2), row("up_proj", 1, 0.1))

    assert (1, pytest.approx(2.0)) == tuple(rows.loc["relative", ["layers", "ratio"]])


def test_experts_of_a_layer_count_as_one_matrix() -> None:
    """Squares add up over experts, mean |Δ| is weighed and max |Δ| the largest, by hand."""
    experts = [
        row(role, 0, delta, expert=expert)
        for role, deltas in (("gate_proj", (0.3, 0.4)), ("up_proj", (0.1, 0.0)))
        for expert, delta in enumerate(deltas)
    ]
    rows = contrasted(
        *experts, row("gate_proj", 0, 9.0, label="shared"), row("up_proj", 0, 1.0, label="shared")
    )

    assert {1} == set(rows["layers"])
    assert pytest.approx([5.0, 5.0, 5.0, 7.0, 4.0]) == list(rows["ratio"])
    assert pytest.approx([1.0, 1.0, 1.0, 1.0]) == list(rows["noise_ratio"].drop("max_abs"))


def test_a_mixture_of_experts_has_a_contrast() -> None:
    """The whole way, from a model with experts."""
    model = tiny("mixtral", num_local_experts=3)

    rows = al.diff(model, nudge(tiny("mixtral", num_local_experts=3), "experts"), progress=False)

    assert {2} == set(rows.contrast(*GATE_UP)["layers"])


def test_views_can_say_that_gates_alone_moved(gates: al.Drift) -> None:
    """An infinite ratio is written as such and drawn at the edge of the axis."""
    found = conclude(gates)
    drawn = norm_contrast(gates)

    assert "gate_proj moved more than up_proj under every norm (median ratios over 2 layers: ∞)" in str(found)
    assert all(np.isfinite(trace.x).all() for trace in drawn.data if trace.name == "tuned − base")
    assert ["∞"] * 5 == list(next(trace for trace in drawn.data if trace.name == "tuned − base").text)


def test_by_site_has_one_row_a_site(units: al.Drift) -> None:
    """Its key is the site, its figures those of the table."""
    rows = units.by("site").set_index("site")
    sites = dict(zip(map(repr, units.sites), units.frame["relative"], strict=True))

    assert set(sites) == set(rows.index)
    np.testing.assert_allclose([sites[name] for name in rows.index], rows["relative"], rtol=1e-12)


@pytest.mark.parametrize(("kind", "role", "count"), [("head", "q_proj", 4), ("neuron", "down_proj", 48)])
def test_units_can_be_groups(kind: str, role: str, count: int, units: al.Drift) -> None:
    """With layer and role each unit is a row, and their squares add up to the site's."""
    rows = units.by(f"layer,role,{kind}")
    one = rows[(rows["role"] == role) & (rows["layer"] == 1)]
    site = units.where(role=role, layer=1).frame.iloc[0]
    alone = units.by(kind)

    assert list(range(count)) == sorted(one[kind])
    assert {1} == set(one["sites"])
    assert pytest.approx(site["frobenius"], rel=1e-5) == np.sqrt((one["frobenius"] ** 2).sum())
    assert site["size"] == one["size"].sum()
    assert count == len(alone)
    assert pytest.approx((rows["frobenius"] ** 2).sum()) == (alone["frobenius"] ** 2).sum()


def test_units_that_were_not_measured_are_no_groups(gates: al.Drift, units: al.Drift) -> None:
    """The error says how to have them; both at once have no meaning."""
    with pytest.raises(TableError, match="can't aggregate by 'head': this drift has no heads: make it with"):
        gates.by("head")
    with pytest.raises(TableError, match="no matrix has both"):
        units.by("head,neuron")


def test_custom_measures_add_up() -> None:
    """They are sums, and null where a site's is."""
    sites = [row("gate_proj", 0, 0.1, ours=1.5), row("gate_proj", 1, 0.1, ours=2.0), row("up_proj", 0, 0.1)]
    rows = drift_of(*sites, custom=["ours"]).by("role").set_index("role")

    assert 3.5 == rows.loc["gate_proj", "ours"]
    assert np.isnan(rows.loc["up_proj", "ours"])


def test_the_cosine_of_a_group_is_that_of_its_tensors_end_to_end() -> None:
    """(1, 0) → (1, 0) and (0, 1) → (1, 1): ⟨b,t⟩ = 2, over √2 · √3; null where a site's is."""
    sides = [{"base_norm": 1.0, "tuned_norm": 1.0, "cosine": 1.0}]
    sides += [{"base_norm": 1.0, "tuned_norm": np.sqrt(2), "cosine": np.sqrt(0.5)}]
    frame = drift_of(*(row("gate_proj", n, 0.1, **side) for n, side in enumerate(sides))).frame

    found = aggregate(frame, ["role"])["cosine"][0]

    assert pytest.approx(2 / np.sqrt(6)) == found
    assert np.isnan(aggregate(frame.assign(cosine=[1.0, np.nan]), ["role"])["cosine"][0])


def test_out_of_reach_is_told_from_standing_still() -> None:
    """`targeted` counts sites; where it is 0 no rounding could have happened."""
    sites = [row("gate_proj", 0, 0.0), row("gate_proj", 1, 0.0, targeted=False)]
    rows = drift_of(*sites, row("up_proj", 0, 0.0, targeted=False)).by("role").set_index("role")

    assert {"gate_proj": 1, "up_proj": 0} == rows["targeted"].to_dict()
    assert {0.0} == set(rows["frobenius"])
    assert [False, True] == list(rows["rounding"].isna()[["gate_proj", "up_proj"]])


def test_a_repr_begins_with_what_must_not_be_overlooked() -> None:
    """Findings, then the ledger in a line, then what moved most; escaped in HTML."""
    sites = [row("gate_proj", layer, 0.01 * layer) for layer in range(20)]
    ledger = [{"state": "paired", "sites": 19}, {"state": "identical", "sites": 1}]
    drift = drift_of(*sites, ledger=ledger, findings=["<b>no</b> \x1b[31mbase"])
    lines, drawn = repr(drift).splitlines(), drift._repr_html_()

    assert ["! <b>no</b> �[31mbase", "ledger: 19 paired, 1 identical"] == lines[1:3]
    assert "layers.19." in lines[4]
    assert "targeted" not in lines[3]
    assert "<p>! &lt;b&gt;no&lt;/b&gt; �[31mbase</p><p>ledger: 19 paired, 1 identical</p>" in drawn
    assert drawn.index("layers.19.") < drawn.index("layers.18.")


def test_a_repr_keeps_the_order_of_top() -> None:
    """What was sorted by another column is shown as it was sorted."""
    sites = [row("gate_proj", layer, 0.01 * layer, rms=1.0 / (1 + layer)) for layer in range(20)]

    assert "layers.0." in repr(drift_of(*sites).top(15, "rms")).splitlines()[2]


def test_a_repr_shows_what_was_out_of_reach() -> None:
    """The column is there as soon as one site could not move."""
    drift = drift_of(row("gate_proj", 0, 0.1), row("up_proj", 0, 0.0, targeted=False))

    assert "targeted" in repr(drift)
    assert "<th>targeted</th>" in drift._repr_html_()


def test_a_file_without_arrays_says_so(units: al.Drift, tmp_path: Path) -> None:
    """A CSV has no place for them; Parquet and JSON do."""
    load = {end: al.Drift.load(units.save(tmp_path / f"d{end}")) for end in (".csv", ".json", ".parquet")}

    for ask in (lambda: load[".csv"].heads("language.0.q_proj"), lambda: load[".csv"].neurons("gate_proj")):
        with pytest.raises(NoSuchSite, match=r"saved without arrays.*save it as .parquet or .json"):
            ask()
    for end in (".json", ".parquet"):
        found = load[end].heads("language.0.q_proj")
        pd.testing.assert_frame_equal(units.heads("language.0.q_proj"), found)


def test_arrays_have_no_order(units: al.Drift) -> None:
    """Neither `where` nor `top` takes a column of arrays."""
    for ask in (lambda: units.where(unit_frobenius=1.0), lambda: units.top(3, "unit_frobenius")):
        with pytest.raises(TableError, match="'unit_frobenius' has an array in each row"):
            ask()


def test_a_role_is_not_yet_a_site(units: al.Drift) -> None:
    """The error gives a name that would do."""
    with pytest.raises(
        NoSuchSite, match=r"2 sites .* have the role gate_proj: give a layer, e.g. language.0.gate_proj"
    ):
        units.neurons("gate_proj")


def test_contrast_takes_frames_as_well(gates: al.Drift) -> None:
    """The method and the function are one."""
    expected = gates.contrast(*GATE_UP)

    pd.testing.assert_frame_equal(expected, contrast(gates.frame, first=GATE_UP[0], second=GATE_UP[1]))
