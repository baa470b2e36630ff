"""What every intervention checks when it is made: its selection, and that factors are finite."""

import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

import affectlens as al
from affectlens.errors import LensError, NoSuchSite
from tests.lens.families import BY_NAME, base, tuned


def test_what_is_no_place_for_an_intervention_is_told() -> None:
    """Points for weights, sites for activations, both, neither, another width, the model beside itself."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    gates = lens.sites.where(role="gate_proj")
    points = gates.at("gated")
    with pytest.raises(NoSuchSite, match="Transplant changes weights"):
        al.Transplant(points, donor=tuned("llama"))
    with pytest.raises(NoSuchSite, match=r"Steer changes activations.*sites\.at"):
        al.Steer(gates, vector=torch.zeros(3))
    with pytest.raises(NoSuchSite, match="either sites or points, got Point, Site"):
        al.Zero([gates[0], points[0]])  # type: ignore[list-item]
    with pytest.raises(NoSuchSite, match="either sites or points, got str"):
        al.Zero(iter(["gate_proj"]))  # type: ignore[arg-type]
    with pytest.raises(NoSuchSite, match="would change nothing"):
        al.Zero(points[:0])
    with (
        pytest.raises(LensError, match=r"\d+ features pass there, but the vector has 3"),
        lens.intervene(al.Steer(points, vector=torch.zeros(3))),
    ):
        lens.run(batch)
    with pytest.raises(LensError, match="beside itself"), lens.intervene(al.Patch(points, source=lens)):
        pass


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_factor_is_a_number(wrong: float, tmp_path: Path) -> None:
    """NaN or infinity would silently spread to all that it multiplies."""
    gates = al.Lens(base("llama")).sites.where(role="gate_proj")
    with pytest.raises(LensError, match="alpha must be finite, got"):
        al.Transplant(gates, donor=tmp_path, alpha=wrong)
    with pytest.raises(LensError, match="factor must be finite, got"):
        al.Scale(gates, factor=wrong)
    with pytest.raises(LensError, match="alpha must be finite, got"):
        al.Steer(gates.at("gated"), vector=torch.ones(2), alpha=wrong)


@pytest.mark.parametrize("places", ["one", "list", "iterator", "selection"])
def test_a_selection_is_kept_in_one_form(places: str) -> None:
    """A site, a list, an iterator and `Sites` make equal interventions; a changed copy is made anew."""
    gates = al.Lens(base("llama")).sites.where(role="gate_proj")[:1]
    given = {"one": gates[0], "list": list(gates), "iterator": iter(gates), "selection": gates}[places]
    found = al.Scale(given, factor=2.0)

    assert gates == found.places
    assert al.Scale(gates, factor=2.0) == found
    assert al.Scale(gates, factor=3.0) == replace(found, factor=3.0)
    assert found == pickle.loads(pickle.dumps(found))
    with pytest.raises(FrozenInstanceError):
        found.factor = 1.0  # type: ignore[misc]
