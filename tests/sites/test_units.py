"""Heads and neurons are parts of a site, read and changed like a site."""

import pytest
import torch

from affectlens.checkpoints.memory import from_module
from affectlens.errors import NoSuchSite
from affectlens.interventions import Zero
from affectlens.lens import Lens
from tests.small_models import tiny

# (role, kind, how many, dimension, shared); llama with 4 heads of 8, 2 of them for k and v, 48 neurons
CASES = (
    ("gate_proj", "neuron", 48, 0, 1),
    ("up_proj", "neuron", 48, 0, 1),
    ("down_proj", "neuron", 48, 1, 1),
    ("q_proj", "head", 4, 0, 1),
    ("k_proj", "head", 2, 0, 2),
    ("v_proj", "head", 2, 0, 2),
    ("o_proj", "head", 4, 1, 1),
)


@pytest.mark.parametrize(("role", "kind", "number", "dim", "shared"), CASES)
def test_units_of_a_layer(role: str, kind: str, number: int, dim: int, shared: int) -> None:
    """Neurons are rows of gate and up and columns of down; heads follow grouped queries."""
    checkpoint = from_module(tiny("llama"))
    (site,) = checkpoint.sites.where(role=role, layer=1).expect(1)

    units = checkpoint.units(site)

    assert units is not None
    assert (kind, number, dim, shared) == (units.kind, units.count, units.dim, units.shared)
    parts = [checkpoint.read(site.at(**{kind: n})) for n in range(number)]
    assert torch.equal(checkpoint.read(site), torch.cat(parts, dim))


def test_a_head_is_changed_alone() -> None:
    """Zeroing one head of v changes its rows alone, and is undone."""
    lens = Lens(tiny("llama"))
    (site,) = lens.sites.where(role="v_proj", layer=0).expect(1)
    before = lens.parameter(site).clone()

    with lens.intervene(Zero(site.at(head=1))):
        during = lens.parameter(site).clone()

    assert torch.equal(before[:8], during[:8])
    assert not during[8:].any()
    assert torch.equal(before, lens.parameter(site))


def test_a_head_that_is_not_there_is_refused() -> None:
    """The error gives the number of heads."""
    checkpoint = from_module(tiny("llama"))
    (site,) = checkpoint.sites.where(role="k_proj", layer=0).expect(1)

    with pytest.raises(NoSuchSite, match="has 2 heads, so"):
        checkpoint.read(site.at(head=2))
    with pytest.raises(NoSuchSite, match="has 2 heads, so"):
        checkpoint.read(site.at(neuron=0))
    (norm,) = checkpoint.sites.where(role="norm", layer=None, tower="language").expect(5)[:1]
    assert checkpoint.units(norm) is None
