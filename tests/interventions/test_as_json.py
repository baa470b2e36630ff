"""A plan survives the way through JSON; an intervention without a JSON form says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import affectlens as al
from affectlens import interventions
from affectlens.errors import LensError
from affectlens.interventions import from_json, to_json
from affectlens.interventions.as_json import KINDS as ROWS
from tests.lens.families import BY_NAME, base, tuned
from tests.numbers import differ


def plans(folder: Path, sites: al.Sites) -> dict[str, Any]:
    gates, points = sites.where(role="gate_proj"), sites.where(role="gate_proj").at("gated", span=(-1, 2))
    attention = sites.where(role="o_proj")
    examples = (al.Example("a", "x", text="hello", images=("a.png",), video=(("1.png", "2.png"),)),)
    return {
        "transplant": al.Transplant(gates, donor=folder, alpha=0.5),
        "adapter": al.Transplant(gates[0].at(neuron=3), donor=al.open_checkpoint(folder)),
        "zero": al.Zero(gates),
        "zero points": al.Zero(points),
        "scale": al.Scale(attention.at("heads"), factor=0.25),
        "randomise": al.Randomise(gates, seed=3, donor=str(folder)),
        "shuffle": al.Shuffle(gates, seed=4),
        "steer": al.Steer(points, vector=torch.arange(5.0), alpha=2.0),
        "knockout": al.Knockout(attention, source="text", target=(-1, 0)),
        "mean": al.Mean(points, over=examples),
        "resample": al.Resample(points, over=examples, seed=2),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned model on disk."""
    found = tmp_path_factory.mktemp("tuned")
    tuned("llama").save_pretrained(found)  # type: ignore[operator]
    return found


KINDS = (
    "transplant", "adapter", "zero", "zero points", "scale", "randomise", "shuffle", "steer", "knockout",
    "mean", "resample",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_down_is_read_again(kind: str, folder: Path) -> None:
    """Through text and back, and once more, nothing is lost."""
    plan = plans(folder, al.Lens(base("llama")).sites)[kind]
    text = json.dumps(to_json(plan), allow_nan=False)
    again = from_json(json.loads(text))

    assert type(plan) is type(again)
    assert json.loads(text) == to_json(again)
    for name in ("sites", "points", "places", "over", "source", "target"):
        assert getattr(plan, name, None) == getattr(again, name, None)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("steer", "mean", "resample")])
def test_the_same_plan_does_the_same(kind: str, folder: Path) -> None:
    """The logits are equal to the bit."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    plan = plans(folder, lens.sites)[kind]
    found = []
    for one in (plan, from_json(to_json(plan))):
        with lens.intervene(one):
            found.append(lens.run(batch))

    assert torch.equal(*found)
    assert differ(found[0], lens.run(batch))


def test_every_intervention_has_a_row(folder: Path) -> None:
    """All that the package exports but `Patch`, and each is tried here."""
    exported = {name for name in interventions.__all__ if name[0].isupper()}
    tried = {type(plan).__name__ for plan in plans(folder, al.Lens(base("llama")).sites).values()}

    assert exported == ROWS.keys() | {"Patch"}
    assert tried == ROWS.keys()


def test_what_is_of_this_process_alone_is_told(folder: Path) -> None:
    """Modules, recordings and unknown names are refused."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    gates = lens.sites.where(role="gate_proj")
    points = gates.at("gated")
    recording = lens.record(points, batch)
    with pytest.raises(LensError, match="of this process and has no JSON"):
        to_json(al.Transplant(gates, donor=tuned("llama")))
    with pytest.raises(LensError, match="of this process and has no JSON"):
        to_json(al.Mean(points, over=recording))
    with pytest.raises(LensError, match="Patch has no JSON form"):
        to_json(al.Patch(points, source=recording))
    for wrong in ({}, {"intervention": "Zeroo"}, {"intervention": "Zero", "placess": []}):
        with pytest.raises(LensError):
            from_json(wrong)


def test_an_intervention_shows_its_donor_in_a_word(folder: Path) -> None:
    """The repr names a module by its class instead of drawing its layers."""
    gates = al.Lens(base("llama")).sites.where(role="gate_proj")

    assert "donor='LlamaForCausalLM', alpha=1)" in repr(al.Transplant(gates, donor=tuned("llama")))
    assert 200 > len(repr(al.Randomise(gates, donor=tuned("llama"))))
