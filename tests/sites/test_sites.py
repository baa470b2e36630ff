"""Selections of sites are values; an empty selection and a wrong count are errors."""

import pytest

from affectlens.errors import NoSuchSite, WrongCount
from affectlens.sites import Site, Sites
from affectlens.sites.points import KINDS
from affectlens.sites.span_names import KNOWN

SITES = Sites(
    Site(tower, role, layer=layer)
    for tower in ("language", "vision")
    for layer in range(4)
    for role in ("gate_proj", "up_proj", "q_proj")
)


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        ({"role": "gate_proj"}, 8),
        ({"role": "mlp", "tower": "language"}, 8),
        ({"role": ["gate_proj", "q_proj"]}, 16),
        ({"layer": 2}, 6),
        ({"layer": range(1, 3)}, 12),
        ({"layer": lambda layer: layer % 2}, 12),
        ({"role": "attention", "layer": [0], "tower": "vision"}, 1),
    ],
)
def test_where(choice: dict[str, object], count: int) -> None:
    """A field takes a value, a collection, a group or a function."""
    assert count == len(SITES.where(**choice))  # type: ignore[arg-type]


def test_nothing_found_says_what_is_there() -> None:
    """The error names the roles and the nearest one."""
    with pytest.raises(NoSuchSite) as caught:
        SITES.where(role="gate")

    expected = "no site has role='gate'. Roles here: gate_proj, q_proj, up_proj. Did you mean 'gate_proj'?"
    assert expected == str(caught.value)


def test_one_of_several_that_is_not_there_is_an_error() -> None:
    """Otherwise a typo in a list would silently shrink the selection."""
    with pytest.raises(NoSuchSite, match=r"no site has role='gate_prj'.*Did you mean 'gate_proj'"):
        SITES.where(role=["gate_prj", "up_proj"])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"layer": 12}, "no site has layer=12. Layers here: 0, 1, 2, 9, 10, 11, None"),
        (
            {"layer": lambda layer: layer > 11},
            "no site has a layer that satisfies the function. Layers here: 0, 1, 2, 9, 10, 11, None",
        ),
        (
            {"role": ["gates", "x"]},
            "no site has role='gates'. Roles here: gate_proj, norm. Did you mean 'gate_proj'?",
        ),
    ],
)
def test_values_are_listed_in_their_order(choice: dict[str, object], expected: str) -> None:
    """Layers by number, None for what is outside of layers at the end."""
    sites = Sites(
        [Site("language", "norm"), *(Site("language", "gate_proj", n) for n in (0, 1, 2, 9, 10, 11))]
    )

    with pytest.raises(NoSuchSite) as caught:
        sites.where(**choice)  # type: ignore[arg-type]
    assert expected == str(caught.value)


@pytest.mark.parametrize(
    ("kind", "span", "expected"),
    [
        (
            "outputs",
            None,
            f"no point 'outputs'. Points: {', '.join(KINDS)}. Did you mean 'output'?",
        ),
        (
            "output",
            "images",
            f"no span 'images'. Spans: {', '.join(KNOWN[:8])}, …. Did you mean 'image'?",
        ),
        (
            "output",
            1.5,
            f"no span 1.5. Spans: {', '.join(KNOWN)}",
        ),
    ],
)
def test_an_unknown_point_or_span_names_the_known_ones(kind: str, span: object, expected: str) -> None:
    """The error lists the kinds or spans, and the closest one."""
    with pytest.raises(NoSuchSite) as caught:
        SITES.at(kind, span=span)  # type: ignore[arg-type]
    assert expected == str(caught.value)


def test_a_head_and_a_neuron_exclude_each_other() -> None:
    """A matrix has heads or neurons."""
    with pytest.raises(ValueError, match=r"^give head=1 or neuron=2: no matrix has both$"):
        Site("language", "q_proj").at(head=1, neuron=2)


def test_expect() -> None:
    """A wrong count is an error that shows the selection, of sites and of points."""
    gates = SITES.where(role="gate_proj", tower="vision")

    with pytest.raises(
        WrongCount, match=r"^expected 3 sites, got 4: Sites\(4: vision gate_proj, layers 0-3\)$"
    ):
        gates.expect(3)
    with pytest.raises(
        WrongCount, match=r"^expected 3 points, got 4: Points\(4: vision.0.gate_proj@gated, .*, …\)$"
    ):
        gates.at("gated").expect(3)
    assert gates == gates.expect(4)


def test_set_operations() -> None:
    """Selections join, subtract and intersect."""
    gates, vision = SITES.where(role="gate_proj"), SITES.where(tower="vision")

    assert (16, 4, 4) == (len(gates | vision), len(gates - vision), len(gates & vision))


def test_canonical_name_takes_no_part_in_equality() -> None:
    """Two layouts of one parameter are one site."""
    one, two = (Site("language", "norm", label="norm", parameter=name) for name in ("model.norm", "norm"))

    assert one == two
    assert hash(one) == hash(two)


def test_representations() -> None:
    """Sites print as `tower.layer.role`, and names are escaped in notebooks."""
    assert "language.3.gate_proj" == repr(Site("language", "gate_proj", layer=3))
    assert "language.0.norm(input_layernorm)" == repr(
        Site("language", "norm", layer=0, label="input_layernorm")
    )
    assert "&lt;b&gt;" in Sites([Site("<b>", "other")])._repr_html_()
