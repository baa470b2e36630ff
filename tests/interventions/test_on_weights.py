"""Zeros, multiples, noise and shuffles of weights; a draw depends on its seed and site alone."""

import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch

import affectlens as al
from tests.lens.families import BY_NAME, base, tuned

KINDS = (al.Randomise, al.Shuffle)
FAMILIES = ("llama", "phi3", "gpt2", "qwen2_moe")


def lens_of(name: str) -> al.Lens:
    return al.Lens(base(name))


def inside(lens: al.Lens, change: Any, site: al.Site) -> torch.Tensor:
    """The values of a site while an intervention holds."""
    with lens.intervene(change):
        return lens.parameter(site).clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_size_stays_and_the_meaning_goes(name: str, kind: Any) -> None:
    """The Frobenius norm is kept, the correlation is near 0; a shuffle keeps the values."""
    lens = lens_of(name)
    for site in lens.sites.where(tower="language", role="mlp" if name != "gpt2" else "fc1", param="weight")[
        :4
    ]:
        before, after = lens.parameter(site).clone(), inside(lens, kind(site, seed=1), site)
        assert float(before.norm()) == pytest.approx(float(after.norm()), rel=1e-5)
        both = torch.stack([before.flatten(), after.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / before.numel() ** 0.5
        if kind is al.Shuffle:
            assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_change_the_size_stays(kind: Any) -> None:
    """With a donor, base is kept, and noise of the norm of the change is added."""
    lens, donor = lens_of("llama"), al.open_checkpoint(tuned("llama"))
    for site in lens.sites.where(role="gate_proj"):
        before, change = lens.parameter(site).clone(), donor.read(site) - lens.parameter(site)
        after = inside(lens, kind(site, donor=tuned("llama")), site) - before
        assert float(change.norm()) == pytest.approx(float(after.norm()), rel=1e-3)
        assert abs(float(torch.corrcoef(torch.stack([change.flatten(), after.flatten()]))[0, 1])) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_of_its_seed_and_site(kind: Any) -> None:
    """A draw repeats, alone or beside other sites; another seed draws something else."""
    lens = lens_of("llama")
    gates = lens.sites.where(role="gate_proj")
    first = inside(lens, kind(gates[0], seed=1), gates[0])

    assert torch.equal(first, inside(lens, kind(gates, seed=1), gates[0]))
    assert not torch.equal(first, inside(lens, kind(gates, seed=2), gates[0]))
    ups = lens.sites.where(role="up_proj")
    with lens.intervene(al.Transplant(ups[0], donor=tuned("llama"))):
        assert torch.equal(first, inside(lens, kind(gates[0], seed=1), gates[0]))


def test_a_draw_is_the_same_in_another_process() -> None:
    """A worker draws what this process does."""
    program = """
import affectlens as al
from tests.lens.families import base
lens = al.Lens(base("llama"))
site = lens.sites.where(role="gate_proj")[0]
with lens.intervene(al.Randomise(site, seed=3)):
    print(repr(float(lens.parameter(site).double().sum())))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lens = lens_of("llama")
    site = lens.sites.where(role="gate_proj")[0]

    assert float(run.stdout) == float(inside(lens, al.Randomise(site, seed=3), site).double().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["head", "neuron"])
def test_a_unit_is_drawn_alone(kind: Any, unit: str) -> None:
    """The other heads and neurons of the matrix keep their bits."""
    lens = lens_of("llama")
    whole = lens.sites.where(role="q_proj" if unit == "head" else "gate_proj")[0]
    before, after = lens.parameter(whole).clone(), inside(lens, kind(whole.at(**{unit: 1}), seed=1), whole)
    moved = (before != after).any(1).nonzero().flatten().tolist()
    units = lens.checkpoint.units(whole)

    assert units is not None
    assert list(range(units.size, 2 * units.size)) == moved


def test_scaled_weights_are_scaled() -> None:
    """A factor of 2 doubles each value, and 1 keeps every bit."""
    lens = lens_of("phi3")
    site = lens.sites.where(role="up_proj")[0]
    before = lens.parameter(site).clone()

    assert torch.equal(2 * before, inside(lens, al.Scale(site, factor=2.0), site))
    assert torch.equal(before, inside(lens, al.Scale(site, factor=1.0), site))


def test_up_twice_and_down_half_changes_no_logit() -> None:
    """Norms are not function: this drift of 100 % changes no logit."""
    lens, batch = lens_of("llama"), BY_NAME["llama"].batch()
    plain = lens.run(batch)
    ups, downs = (lens.sites.where(role=role) for role in ("up_proj", "down_proj"))
    with lens.intervene(al.Scale(ups, factor=2.0), al.Scale(downs, factor=0.5)):
        assert torch.equal(plain, lens.run(batch))


@pytest.mark.parametrize("change", [al.Zero, partial(al.Scale, factor=0.0)], ids=["zero", "scale by 0"])
@pytest.mark.parametrize(
    ("name", "settings", "role", "deletes"),
    [
        ("llama", {}, "gate_proj", True),
        ("llama", {}, "up_proj", True),
        ("llama", {}, "down_proj", True),
        ("llama", {}, "mlp", False),  # to zero all three is to ask for the deletion
        ("llama", {}, "q_proj", False),
        ("llama", {"hidden_act": "sigmoid"}, "gate_proj", False),  # act(0) = 0.5
        ("gpt2", {}, "fc1", False),
    ],
)
def test_a_remark_says_where_zeros_delete_the_mlp(
    change: Any, name: str, settings: dict[str, Any], role: str, deletes: bool
) -> None:
    """Zero and Scale by 0 give the same weights and the same remark; Scale by 0.5 makes none."""
    lens = al.Lens(BY_NAME[name].build(**settings))
    sites = lens.sites.where(tower="language", role=role)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with lens.intervene(change(sites)):
            zeroed = [lens.parameter(site).any() for site in sites]
        with lens.intervene(al.Scale(sites, factor=0.5)):
            pass

    assert not any(zeroed)
    assert int(deletes) == len(found)
    assert all("deletes the MLP" in str(one.message) for one in found)
