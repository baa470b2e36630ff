"""Media replace their placeholders, so at the input embedding they are what enters the first layer."""

import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError, Remark
from affectlens.lens import Activations
from affectlens.lens.hooks.places import place_of
from affectlens.sites import Point, Points
from tests.lens.families import BY_NAME, FAMILIES, Batch, base, lens_of, logits

MEDIA = [(family.name, medium) for family in FAMILIES for medium in family.media]


def embedded(lens: al.Lens, span: str | None) -> Points:
    where = lens.sites.where(tower="language", role="embed_tokens").at("output", span=span)
    return Points([where[0]])


def first_layer(lens: al.Lens) -> nn.Module:
    site = lens.sites.where(tower="language", role="down_proj", layer=0)[0]
    place = place_of(Point(site, "residual"), model=lens.model, live=lens.checkpoint)
    return lens.model.get_submodule(place.module)


def by_hand(model: nn.Module, batch: Batch, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters the first layer at some positions, and the logits where it is zero."""
    seen: list[Tensor] = []

    def entered(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden[chosen])
        new = torch.where(chosen[..., None], 0.0, hidden)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    handle = first_layer(lens_of(model)).register_forward_pre_hook(entered, with_kwargs=True)
    found = logits(model, batch)
    handle.remove()
    return seen[0], found


@pytest.mark.parametrize(("name", "medium"), MEDIA)
def test_a_medium_at_the_embedding_is_what_enters_the_first_layer(name: str, medium: str) -> None:
    """It is recorded and changed there, and no row of it is the placeholder."""
    model, batch = base(name), BY_NAME[name].batch()
    lens, chosen = lens_of(model), BY_NAME[name].span(batch, medium)
    where = embedded(lens, medium)
    rows, expected = by_hand(model, batch, chosen)
    found = lens.record(where, batch)[where[0]]
    with lens.intervene(al.Zero(where)):
        changed = logits(model, batch)

    assert isinstance(found, Activations)
    assert torch.equal(found.rows, rows)
    assert not (found.rows == found.rows[0]).all()
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, logits(model, batch))


@pytest.mark.parametrize("span", [None, "prompt"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "qwen2_audio"])
def test_a_change_of_placeholders_is_remarked(name: str, span: str | None) -> None:
    """Other spans are the output of the embedding; where a placeholder passes, a remark says so, once."""
    model, family = BY_NAME[name].build(), BY_NAME[name]
    lens = al.Lens(model)
    batch, words = family.batch(), {k: v[:, -2:] for k, v in family.batch().items() if v.ndim == 2}
    text = {name: words[name] for name in ("input_ids", "attention_mask")}
    change = al.Scale(embedded(lens, span), factor=2.0)
    with lens.intervene(change):
        lens.run(text)  # without media, nothing is remarked
    with lens.intervene(change), pytest.warns(Remark, match="a placeholder, which the model then replaces"):
        lens.run(batch)
    with lens.intervene(change, al.Scale(embedded(lens, "text"), factor=2.0)):
        lens.run(batch)


def test_another_width_at_a_medium_is_told_before_anything_runs() -> None:
    """What enters the first layer has the width of the stream."""
    lens = al.Lens(base("llava"))
    with pytest.raises(LensError, match="64 features pass there, but the vector has 32"):
        lens.intervene(al.Steer(embedded(lens, "image"), vector=torch.ones(32))).__enter__()
