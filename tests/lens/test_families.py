"""Every family: its media are used, its weights swap to the bit, and a deleted MLP is told as one."""

import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import Remark
from affectlens.lens.inputs.placeholders import spans
from affectlens.sites import ATTENTION, MLP
from tests.lens.families import BY_NAME, FAMILIES, GATED, NAMES, base, lens_of, logits, tuned
from tests.lens.test_lens import same, snapshot
from tests.numbers import differ

DTYPES = (torch.float32, torch.bfloat16)
MEDIA = [(family.name, medium) for family in FAMILIES for medium in family.media]
TENSOR = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
BIAS = {"mlp_bias": True}


def told(lens: al.Lens, *interventions: object) -> list[str]:
    """What is said on entering a block."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with lens.intervene(*interventions):  # type: ignore[arg-type]
            pass

    assert {Remark} >= {one.category for one in found}
    return [str(one.message) for one in found]


def changed(model: nn.Module, batch: dict[str, torch.Tensor], *interventions: object) -> torch.Tensor:
    """The logits inside a block, whatever is said on entering it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)
        with lens_of(model).intervene(*interventions):  # type: ignore[arg-type]
            return logits(model, batch)


def test_there_are_enough_families() -> None:
    """Text, pictures, video, sound, experts and two stacks, each more than once."""
    assert len(FAMILIES) >= 12
    assert {"image", "video", "audio"} == {medium for _, medium in MEDIA}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_says_something(name: str) -> None:
    """Logits are finite, and differ from position to position, from row to row and from token to token."""
    found = logits(base(name), BY_NAME[name].batch())

    assert torch.isfinite(found).all()
    for dim in range(3):
        assert found.std(dim).mean() > 0.1
    assert differ(found, logits(tuned(name), BY_NAME[name].batch()))


@pytest.mark.parametrize(("name", "medium"), MEDIA)
def test_media_are_used_where_they_stand(name: str, medium: str) -> None:
    """Another picture, film or sound changes its own row from its placeholders on, and nothing else."""
    family = BY_NAME[name]
    batch = family.batch()
    other = dict(batch)
    values = batch[TENSOR[medium]].clone()
    values[len(values) // 2 :] += 1  # what belongs to the second row
    other[TENSOR[medium]] = values
    before, after = (logits(base(name), one) for one in (batch, other))
    where = family.span(batch, medium)[1].nonzero().flatten()
    moved = (before != after).any(-1)

    assert not moved[0].any()
    assert not moved[1, : int(where[0])].any()
    assert moved[1, int(where[-1]) :].all()


@pytest.mark.parametrize(("name", "medium"), MEDIA)
def test_spans_are_where_the_media_are(name: str, medium: str) -> None:
    """The config tells the same placeholders as the batch was made with."""
    family = BY_NAME[name]
    batch = family.batch()
    found = spans(batch["input_ids"], batch["attention_mask"], config=base(name).config)

    assert torch.equal(family.span(batch, medium), found[medium])
    assert set(family.media) <= {kind for kind in found if found[kind].any()} - {"text"}


@pytest.mark.filterwarnings("error::affectlens.errors.Remark")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_of_a_donor_is_the_donor(name: str, dtype: torch.dtype) -> None:
    """Base with all of tuned's weights is tuned to the bit, and the other way round; nothing is said."""
    models, batch = (base(name, dtype), tuned(name, dtype)), BY_NAME[name].batch()
    before = [snapshot(model) for model in models]
    expected = [logits(model, batch) for model in models]
    for live, donor, wanted in ((*models, expected[1]), (*reversed(models), expected[0])):
        lens = al.Lens(live)
        with lens.intervene(al.Transplant(lens.sites, donor=donor)):
            assert torch.equal(wanted, logits(live, batch))

    assert all(same(one, snapshot(model)) for one, model in zip(before, models, strict=True))
    assert all(torch.equal(one, logits(m, batch)) for one, m in zip(expected, models, strict=True))


@pytest.mark.filterwarnings("error::affectlens.errors.Remark")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_of_a_saved_donor_is_the_donor(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same from files, whatever layout transformers saves a family in."""
    tuned(name, dtype).save_pretrained(tmp_path)  # type: ignore[operator]
    model, batch = base(name, dtype), BY_NAME[name].batch()
    lens = al.Lens(model)
    with lens.intervene(al.Transplant(lens.sites, donor=tmp_path)):
        assert torch.equal(logits(tuned(name, dtype), batch), logits(model, batch))


@pytest.mark.parametrize("name", NAMES)
def test_halves_make_a_whole(name: str) -> None:
    """Attention, MLPs and the rest, transplanted one after another in nested blocks, are the donor."""
    model, batch = base(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    attention = lens.sites.where(role=lambda role: role in ATTENTION)
    mlps = lens.sites.where(role=lambda role: role in (*MLP, "fc1", "fc2"))
    rest = lens.sites - attention - mlps
    donor = tuned(name)
    with (
        lens.intervene(al.Transplant(attention, donor=donor)),
        lens.intervene(al.Transplant(mlps, donor=donor), al.Transplant(rest, donor=donor)),
    ):
        assert torch.equal(logits(donor, batch), logits(model, batch))
    assert torch.equal(logits(BY_NAME[name].build(), batch), logits(model, batch))


def ties(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has more than one, by the parameter and by its memory."""
    found: dict[object, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name)
        found["at", parameter.data_ptr()].append(name)
    return [names for names in found.values() if len(names) > 1]


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "whisper", "t5", "t5gemma"])
def test_tied_weights_stay_tied(name: str) -> None:
    """Input and output embedding are one parameter before, in and after a block, and change together."""
    model = base(name)
    lens, before = al.Lens(model), ties(model)
    assert any("embed" in one or "wte" in one or "shared" in one for names in before for one in names)
    for change in (al.Transplant(lens.sites, donor=tuned(name)), al.Scale(lens.sites, factor=2.0)):
        with lens.intervene(change):
            assert before == ties(model)
        assert before == ties(model)


def language(model: nn.Module, role: str) -> al.Sites:
    """The matrices of a role in the text model, of all experts."""
    return al.Lens(model).sites.where(tower="language", role=role, param="weight")


def deletions(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [changed(model, batch, al.Zero(language(model, role))) for role in MLP]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATED)
def test_a_zeroed_gate_is_a_zeroed_up_and_a_zeroed_down(name: str, dtype: torch.dtype) -> None:
    """All three delete the MLP: same logits to the bit, and what comes out of it is nothing."""
    model, batch = base(name, dtype), BY_NAME[name].batch()
    gate, up, down = deletions(model, batch)
    out = al.Sites(site for site in language(model, "down_proj") if site.expert is None)
    if len(out):
        lens = al.Lens(model)
        with lens.intervene(al.Zero(language(model, "gate_proj"))):
            passed = lens.record(out, batch)
        assert not any(passed[point].values.any() for point in passed)  # type: ignore[union-attr]

    assert torch.equal(gate, up)
    assert torch.equal(gate, down)
    assert differ(gate, logits(model, batch))


@pytest.mark.parametrize("role", MLP)
@pytest.mark.parametrize("name", GATED)
def test_that_a_gate_says_nothing_of_itself_is_told(name: str, role: str) -> None:
    """Whoever zeroes gate, up or down of such an MLP is told that the three are one."""
    (one,) = told(al.Lens(base(name)), al.Zero(language(base(name), role)))

    assert "gate" in one
    assert "MLP" in one


UNLIKE = {
    "a gate with a bias": ("llama", BIAS),
    "an activation that is not 0 at 0": ("llama", {"hidden_act": "sigmoid"}),
    "biases among pictures": ("llava", {"text_config.mlp_bias": True}),
}


@pytest.mark.parametrize("why", UNLIKE)
def test_where_a_zeroed_gate_is_something_else_nothing_is_told(why: str) -> None:
    """With a bias, or where act(0) is not 0, what passes is not nothing: other logits, and no remark."""
    name, changes = UNLIKE[why]
    model, batch = BY_NAME[name].build(**changes), BY_NAME[name].batch()
    gate, up, down = deletions(model, batch)

    assert differ(gate, up)
    assert differ(gate, down)
    assert [] == told(al.Lens(model), al.Zero(language(model, "gate_proj")))


def test_what_is_left_of_a_deleted_mlp_is_the_bias_of_its_down() -> None:
    """Gate and up without biases, down with one: still one deletion, and still told."""
    model, batch = BY_NAME["llama"].build(**BIAS), BY_NAME["llama"].batch()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.gate_proj.bias = layer.mlp.up_proj.bias = None  # type: ignore[union-attr]
    lens = al.Lens(model)
    gate, up, down = deletions(model, batch)
    points = language(model, "down_proj").at("output")
    with lens.intervene(al.Zero(language(model, "gate_proj"))):
        passed = lens.record(points, batch)

    assert torch.equal(gate, up)
    assert torch.equal(gate, down)
    for point in points:
        values = passed[point].values  # type: ignore[union-attr]
        bias = lens.module(point.site).bias
        assert torch.equal(bias.expand_as(values), values)  # type: ignore[operator, arg-type]
    assert [] != told(al.Lens(model), al.Zero(language(model, "gate_proj")))


def test_gate_and_bias_together_delete_the_mlp_too() -> None:
    """Zeroed with their biases, gate and up are both a deletion, and what is left is the bias of down."""
    model, batch = BY_NAME["llama"].build(**BIAS), BY_NAME["llama"].batch()
    sites = al.Lens(model).sites
    gate, up = (changed(model, batch, al.Zero(sites.where(role=role))) for role in ("gate_proj", "up_proj"))

    assert torch.equal(gate, up)
    assert torch.equal(gate, changed(model, batch, al.Zero(language(model, "down_proj"))))
    assert [] != told(al.Lens(model), al.Zero(sites.where(role="gate_proj")))


@pytest.mark.parametrize("name", ["gpt2", "whisper", "t5"])
def test_an_mlp_without_a_gate_is_not_spoken_of(name: str) -> None:
    """Zeroing its matrices is what it says."""
    sites = al.Lens(base(name)).sites.where(role="fc1")

    assert [] == told(al.Lens(base(name)), al.Zero(sites))


def test_biased_gates_of_a_vision_tower_are_not_spoken_of() -> None:
    """Qwen2.5-VL's pictures pass gates with biases: told of the text's alone."""
    model, batch = base("qwen2_5_vl"), BY_NAME["qwen2_5_vl"].batch()
    lens = al.Lens(model)
    gates, ups = (lens.sites.where(tower="vision", role=r, param="weight") for r in ("gate_proj", "up_proj"))

    assert differ(changed(model, batch, al.Zero(gates)), changed(model, batch, al.Zero(ups)))
    assert [] == told(lens, al.Zero(gates))


@pytest.mark.parametrize("role", ["q_proj", "norm"])
def test_other_roles_are_not_spoken_of(role: str) -> None:
    """Only of what makes an MLP is anything said."""
    lens = al.Lens(base("llama"))

    assert [] == told(lens, al.Zero(lens.sites.where(role=role)))


def test_a_part_of_the_gates_is_told_as_well() -> None:
    """One layer, one expert or one neuron of a gate is deleted just the same."""
    model, batch = base("qwen2_moe"), BY_NAME["qwen2_moe"].batch()
    one = {role: language(model, role)[0] for role in MLP}
    neuron = {role: site.at(neuron=3) for role, site in one.items()}
    for some in (one, neuron):
        gate, up, down = (changed(model, batch, al.Zero(some[role])) for role in MLP)

        assert torch.equal(gate, up)
        assert torch.equal(gate, down)
        assert [] != told(al.Lens(model), al.Zero(some["gate_proj"]))


def test_the_shared_models_are_as_they_were_built() -> None:
    """None of the tests above has left anything in a model that others use."""
    for family in FAMILIES:
        fresh, kept = family.build(), base(family.name)

        assert all(torch.equal(one, kept.state_dict()[name]) for name, one in fresh.state_dict().items())
