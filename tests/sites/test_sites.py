"""Selecting sites: a value that knows its size and never matches nothing in silence."""

import pytest

from affectlens.errors import NoSuchSite, WrongCount
from affectlens.sites import Site, Sites

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
    """A typo in a list would otherwise shrink the selection in silence."""
    with pytest.raises(NoSuchSite, match=r"no site has role='gate_prj'.*Did you mean 'gate_proj'"):
        SITES.where(role=["gate_prj", "up_proj"])


def test_expect() -> None:
    """A wrong count is an error that shows the selection."""
    with pytest.raises(WrongCount, match="expected 3 sites, got 8"):
        SITES.where(role="gate_proj").expect(3)


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
    """Sites print as one reads them, and show in notebooks without markup of their own."""
    assert "language.3.gate_proj" == repr(Site("language", "gate_proj", layer=3))
    assert "language.0.norm(input_layernorm)" == repr(
        Site("language", "norm", layer=0, label="input_layernorm")
    )
    assert "&lt;b&gt;" in Sites([Site("<b>", "other")])._repr_html_()
