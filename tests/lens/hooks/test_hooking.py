"""A point has the right activations; they can be put back unchanged, and a change affects them alone."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError
from affectlens.lens.hooks.places import place_of
from affectlens.sites import Point, Points, Site
from tests.lens.families import BY_NAME, FAMILIES, FEW, NAMES, Batch, base, lens_of, logits, tuned
from tests.lens.test_families import changed, language
from tests.lens.test_lens import same, snapshot
from tests.numbers import differ

KINDS = ("output", "input", "pre_activation", "gated", "heads", "residual")
MEDIA = [(family.name, medium) for family in FAMILIES for medium in family.media]
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}


def points(model: nn.Module, kind: str, *, tower: str | None = "language", span: Any = None) -> Points:
    """Return every point of a kind that a hook can see; it can't see stacked experts."""
    found = _points(model, kind, tower)
    return Points(Point(p.site, kind, span) for p in found if span is None or p.site.role != "embed_tokens")


@cache
def _points(model: nn.Module, kind: str, tower: str | None) -> Points:
    found, places, lens = [], set(), lens_of(model)
    for site in lens.sites:
        point = Point(site, kind)
        if tower not in (None, site.tower) or not passes(site, kind):
            continue
        try:
            place = place_of(point, model=model, live=lens.checkpoint)
        except LensError:
            continue
        if place not in places:  # gate, up and down share one gated activation
            places.add(place)
            found.append(point)
    return Points(found)


def reached(model: nn.Module, where: Points, batch: Batch) -> Points:
    """Return the points whose module runs: some towers have parts that this model does not use."""
    lens, called = lens_of(model), set()
    names = {point: place_of(point, model=model, live=lens.checkpoint).module for point in where}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name in set(names.values())
    ]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return Points(point for point in where if names[point] in called)


def passes(site: Site, kind: str) -> bool:
    """Return whether floating-point activations pass there, one per position and different in each row."""
    if site.param == "bias" or site.role in ("pos_embed", "q_norm", "k_norm"):
        return False  # a bias shares its weight's module; position embeddings are equal in all rows
    if site.role == "router":
        return False  # its scores are not read again
    return site.role != "embed_tokens" or kind == "output"


def own(found: Tensor, batch: Batch) -> Tensor:
    """Return the logits without padding, which a patch leaves unchanged."""
    mask = batch.get("attention_mask")
    return found if mask is None or mask.shape != found.shape[:2] else found[mask.bool()]


def patched(model: nn.Module, where: Points, batch: Batch, *, source: nn.Module | None = None) -> Tensor:
    recorded = lens_of(source or model).record(where, batch)
    return changed(model, batch, al.Patch(where, source=recorded))


def spoken(model: nn.Module, batch: Batch) -> Tensor:
    """Generate greedily."""
    # Whisper strips the padding token, and needs a prompt of its own.
    own = {"pad_token_id"} if "Whisper" in type(model).__name__ else set()
    settings = {name: value for name, value in SETTINGS.items() if name not in own}
    given = {name: t for name, t in batch.items() if not own or name != "decoder_input_ids"}
    found: Tensor = model.generate(**given, **settings)  # type: ignore[operator]
    return found


# ---------------------------------------------------------------- one's own activations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixtral"])
def test_ones_own_activations_change_nothing(name: str, kind: str) -> None:
    """A model patched with its own activations, at all points of the text model at once, is the same."""
    model, batch = base(name), BY_NAME[name].batch()
    where = reached(model, points(model, kind), batch)

    assert len(where) >= 2
    assert torch.equal(logits(model, batch), patched(model, where, batch))


@pytest.mark.parametrize("name", FEW)
def test_ones_own_activations_change_nothing_in_half_precision(name: str) -> None:
    """The same in bfloat16: nothing is rounded on the way."""
    model, batch = base(name, torch.bfloat16), BY_NAME[name].batch()
    for kind in ("gated", "heads", "residual"):
        where = points(model, kind)

        assert torch.equal(logits(model, batch), patched(model, where, batch))


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.media])
def test_ones_own_activations_change_nothing_in_other_towers(name: str) -> None:
    """The same for the input and output of every module in the vision and audio towers."""
    model, batch = base(name), BY_NAME[name].batch()
    for kind in ("output", "input", "residual"):
        every = points(model, kind, tower=None)
        where = Points(point for point in every if point.site.tower in ("vision", "audio", "projector"))
        where = reached(model, Points(p for p in where if "embed" not in p.site.role), batch)

        assert len(where) >= 1
        assert torch.equal(logits(model, batch), patched(model, where, batch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "medium"), MEDIA)
def test_ones_own_activations_in_a_span_change_nothing(name: str, medium: str, kind: str) -> None:
    """The same at the placeholders of a medium alone, recorded there or at all positions."""
    model, batch = base(name), BY_NAME[name].batch()
    where = points(model, kind, span=medium)
    everywhere = Points(Point(point.site, kind) for point in where)
    expected = logits(model, batch)
    whole = lens_of(model).record(everywhere, batch)

    assert torch.equal(expected, patched(model, where, batch))
    assert torch.equal(expected, changed(model, batch, al.Patch(where, source=whole)))


@pytest.mark.parametrize("span", ["text", "last", (-2, 2)], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_ones_own_activations_at_tokens_change_nothing(name: str, span: Any) -> None:
    """The same for spans by name or number, in rows of different length."""
    model, batch = base(name), BY_NAME[name].batch()
    for kind in KINDS:
        where = points(model, kind, span=span)
        where = Points(point for point in where if "cross" not in str(point.site.stack))

        assert torch.equal(logits(model, batch), patched(model, where, batch))


@pytest.mark.parametrize("name", NAMES)
def test_ones_own_activations_change_nothing_in_generation(name: str) -> None:
    """Activations recorded and put back at each step of generation give the same tokens."""
    model, batch = base(name), BY_NAME[name].batch()
    where = points(model, "residual") | points(model, "gated") | points(model, "heads")
    senses = Points(p for p in points(model, "residual", tower=None) if p.site.tower in ("vision", "audio"))
    where = where | reached(model, senses, batch)
    lens = al.Lens(model)
    with lens.record(where) as recorded:
        expected = spoken(model, batch)
    with lens.intervene(al.Patch(where, source=recorded)):
        found = spoken(model, batch)

    assert torch.equal(expected, found)
    assert torch.equal(expected, spoken(model, batch))
    # T5Gemma says the same few tokens.
    assert differ(expected, spoken(tuned(name), batch)) or name == "t5gemma"


@pytest.mark.parametrize("name", FEW)
def test_what_does_nothing_is_nothing(name: str) -> None:
    """A factor of 1, a step of 0 and a knockout between no positions give the same logits to the bit."""
    model, batch = base(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    where = points(model, "gated")
    width = lens.record(where[:1], batch)[where[0]].values.shape[-1]  # type: ignore[union-attr]
    attention = lens.sites.where(tower="language", role="o_proj", param="weight")
    nothing = {
        "scale": al.Scale(where, factor=1.0),
        "steer": al.Steer(where[:1], vector=torch.ones(width), alpha=0.0),
        "knockout": al.Knockout(attention, source=(), target=())
        if name != "t5_gated"
        else al.Scale(where, factor=1.0),
        "weights": al.Scale(lens.sites, factor=1.0),
        "alpha": al.Transplant(lens.sites, donor=tuned(name), alpha=0.0),
    }
    for kind, change in nothing.items():
        assert torch.equal(logits(model, batch), changed(model, batch, change)), kind


def doubled(batch: Batch) -> Batch:
    """Return the row without padding as a batch of one."""
    return {name: tensor[1:] for name, tensor in batch.items()}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "qwen2_moe", "llava", "gemma3", "t5_gated"])
def test_the_mean_of_what_is_always_the_same_is_it(name: str) -> None:
    """The mean of a constant activation, and a sample from it, leave the logits unchanged."""
    model, batch = base(name), doubled(BY_NAME[name].batch())
    for kind in ("gated", "residual", "heads"):
        where = points(model, kind, span="last")
        lens = al.Lens(model)
        once, twice = lens.record(where, batch), lens.record(where, batch, batch)
        expected = logits(model, batch)

        assert torch.equal(expected, changed(model, batch, al.Resample(where, over=once)))
        assert torch.equal(expected, changed(model, batch, al.Resample(where, over=twice, seed=3)))
        assert torch.equal(expected, changed(model, batch, al.Mean(where, over=once)))
        assert torch.equal(expected, changed(model, batch, al.Mean(where, over=twice)))


# ---------------------------------------------------------------- another model's


@pytest.mark.parametrize("name", NAMES)
def test_the_last_residual_and_what_follows_it_are_the_other_model(name: str) -> None:
    """Base with tuned's last residual, final norm and head has tuned's logits."""
    model, donor, batch = base(name), tuned(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    stack = "decoder" if BY_NAME[name].decodes else None
    final = lens.sites.where(tower="language", layer=1)
    final = al.Sites(site for site in final if stack is None or site.stack == stack)
    ends = al.Sites(
        site
        for site in lens.sites
        if site.tower == "language"
        and site.layer is None
        and site.role in ("norm", "lm_head", "embed_tokens")
    )
    where = final[:1].at("residual")
    recorded = al.Lens(donor).record(where, batch)
    found = changed(model, batch, al.Transplant(ends, donor=donor), al.Patch(where, source=recorded))

    expected = own(logits(donor, batch), batch)
    assert torch.equal(expected, own(found, batch))
    assert differ(expected, own(changed(model, batch, al.Patch(where, source=recorded)), batch))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_all_that_is_added_to_the_stream_is_the_other_model(name: str) -> None:
    """Base with all that tuned adds to the residual stream, and tuned's norm and head, has tuned's logits."""
    model, donor, batch = base(name), tuned(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    ends = al.Sites(site for site in lens.sites if site.layer is None and site.role in ("norm", "lm_head"))
    added = al.Sites(s for s in lens.sites if s.role in ("embed_tokens", "o_proj", "down_proj")).at("output")
    recorded = al.Lens(donor).record(added, batch)
    found = changed(model, batch, al.Transplant(ends, donor=donor), al.Patch(added, source=recorded))

    assert torch.equal(own(logits(donor, batch), batch), own(found, batch))


@pytest.mark.parametrize("name", [name for name in NAMES if not BY_NAME[name].decodes or name == "whisper"])
def test_another_model_run_beside_gives_the_same_as_its_recording(name: str) -> None:
    """A lens as the source runs on the same input, and gives the same patch as its recording."""
    model, donor, batch = base(name), tuned(name), BY_NAME[name].batch()
    where = points(model, "residual")
    recorded = al.Lens(donor).record(where, batch)

    live = own(changed(model, batch, al.Patch(where, source=al.Lens(donor))), batch)
    assert torch.equal(own(changed(model, batch, al.Patch(where, source=recorded)), batch), live)
    assert differ(own(logits(model, batch), batch), live)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "t5gemma"])
def test_an_encoder_and_a_decoder_are_patched_from_a_recording(name: str) -> None:
    """An encoder-decoder as a live source is an error; its recording works."""
    model, donor, batch = base(name), tuned(name), BY_NAME[name].batch()
    where = points(model, "residual")
    with pytest.raises(LensError, match="recording"):
        changed(model, batch, al.Patch(where, source=al.Lens(donor)))

    assert differ(logits(model, batch), patched(model, where, batch, source=donor))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_5_vl", "gemma3", "llava_onevision"])
def test_patching_a_span_changes_what_comes_after_it(name: str) -> None:
    """A patch at two tokens changes the logits from there on, and none before."""
    model, donor, batch = base(name), tuned(name), BY_NAME[name].batch()
    where = language(model, "down_proj" if name != "gpt2" else "fc2").at("output", span=(2, 3))
    found = patched(model, where, batch, source=donor)
    moved = (found != logits(model, batch)).any(-1)

    assert not moved[0, :4].any()  # two of them are padding
    assert not moved[1, :2].any()
    assert moved[0, 4:].all()
    assert moved[1, 2:].all()


# In `generate` a live source works for decoders without pictures; a recording works for all.
@pytest.mark.parametrize(
    ("name", "beside"),
    [(name, True) for name in ("llama", "phi3", "gpt2", "mixtral", "qwen2_audio")]
    + [(name, False) for name in ("llama", "gpt2", "qwen2_5_vl", "qwen2_5_omni", "gemma3", "t5_gated")],
)
def test_generation_with_the_other_models_stream_is_the_other_models(name: str, beside: bool) -> None:
    """With tuned's last residual at each step, live or recorded, base generates tuned's tokens."""
    model, donor, batch = base(name), tuned(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    ends = al.Sites(
        s for s in lens.sites if s.layer is None and s.role in ("norm", "lm_head", "embed_tokens")
    )
    stack = "decoder" if BY_NAME[name].decodes else None
    last = al.Sites(s for s in lens.sites.where(tower="language", layer=1) if stack in (None, s.stack))
    where = last[:1].at("residual")
    with al.Lens(donor).record(where) as recorded:
        expected = donor.generate(**batch, **SETTINGS)  # type: ignore[operator]
    change = al.Patch(where, source=al.Lens(donor) if beside else recorded)
    with lens.intervene(al.Transplant(ends, donor=donor), change):
        found = model.generate(**batch, **SETTINGS)  # type: ignore[operator]

    assert torch.equal(expected, found)
    assert differ(model.generate(**batch, **SETTINGS), found)  # type: ignore[operator]


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if "image" in family.media])
def test_another_model_beside_does_not_see_what_this_one_saw(name: str) -> None:
    """A live source in `generate` with pictures is an error: only this model has encoded them."""
    model, donor, batch = base(name), tuned(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    before = spoken(model, batch)
    change = al.Patch(points(model, "residual"), source=al.Lens(donor))
    with pytest.raises(LensError, match="recording"), lens.intervene(change):
        spoken(model, batch)

    assert torch.equal(before, spoken(model, batch))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_the_scores_of_a_router_are_refused(name: str) -> None:
    """A new output of a router is an error: it has chosen its experts before."""
    model = base(name)
    sites = al.Lens(model).sites.where(role="router")
    with pytest.raises(LensError, match="experts"), al.Lens(model).intervene(al.Zero(sites.at("output"))):
        pytest.fail("the block was entered")


# ---------------------------------------------------------------- neurons and heads


def near(one: Tensor, other: Tensor, far: Tensor) -> bool:
    """Return whether two are equal up to rounding, and differ from a third."""
    return torch.allclose(one, other, rtol=0, atol=1e-5) and not torch.allclose(one, far, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FEW if name != "qwen2_moe"])
def test_a_neuron_zeroed_where_it_passes_is_its_column_zeroed(name: str) -> None:
    """Zeroing the gated activation of neuron i equals zeroing column i of down_proj."""
    model, batch = base(name), BY_NAME[name].batch()
    down = next(
        r
        for r in ("down_proj", "fc2")
        if r in {s.role for s in al.Lens(model).sites if s.tower == "language"}
    )
    for number in (0, 5, 95):
        sites = al.Sites(site.at(neuron=number) for site in language(model, down))
        passing = changed(model, batch, al.Zero(sites.at("gated")))

        assert near(changed(model, batch, al.Zero(sites)), passing, logits(model, batch))


@pytest.mark.parametrize("name", [name for name in FEW if name != "qwen2_moe"])
def test_all_neurons_are_the_whole(name: str) -> None:
    """The contributions of all neurons add up to the output of the MLP."""
    model, batch = base(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    down = next(r for r in ("down_proj", "fc2") if r in {s.role for s in lens.sites if s.tower == "language"})
    site = language(model, down)[-1]
    where = Points([Point(site, "gated"), Point(site, "output")])
    recorded = lens.record(where, batch)
    passed = {point: recorded[point].values.double() for point in where}  # type: ignore[union-attr]
    weights = lens.parameter(site).double()
    parts = torch.einsum("...i,oi->...io", passed[where[0]], weights).sum(-2)
    bias = site.__class__(**{**{f: getattr(site, f) for f in site.__dataclass_fields__}, "param": "bias"})
    if bias in lens.sites:
        parts = parts + lens.parameter(bias).double()

    assert torch.allclose(passed[where[1]], parts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_a_head_zeroed_where_it_passes_is_its_columns_zeroed(name: str) -> None:
    """Zeroing the input of o_proj for head h equals zeroing the columns of o_proj for it."""
    model, batch = base(name), BY_NAME[name].batch()
    for head in (0, 3):
        sites = al.Sites(site.at(head=head) for site in language(model, "o_proj"))
        passing = changed(model, batch, al.Zero(sites.at("heads")))

        assert near(changed(model, batch, al.Zero(sites)), passing, logits(model, batch))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("mixtral",)])
def test_zeroing_what_passes_is_zeroing_what_makes_it(name: str) -> None:
    """Zeroing all gated activations equals zeroing down_proj, and zeroing all heads equals zeroing o_proj."""
    model, batch = base(name), BY_NAME[name].batch()
    roles = {site.role for site in al.Lens(model).sites if site.tower == "language"}
    for role, kind in (("down_proj" if "down_proj" in roles else "fc2", "gated"), ("o_proj", "heads")):
        sites = al.Sites(site for site in language(model, role) if site.expert is None)
        passing = changed(model, batch, al.Zero(sites.at(kind)))

        assert near(changed(model, batch, al.Zero(sites)), passing, logits(model, batch))


@pytest.mark.parametrize("name", FEW)
def test_a_fused_part_is_its_own_features(name: str) -> None:
    """Zeroing the output of q in a fused matrix equals zeroing q's weights; k and v are unchanged."""
    model, batch = base(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    for role in ("q_proj", "v_proj"):
        weights = language(model, role)
        both = al.Sites(s for s in lens.sites if s.tower == "language" and s.role == role)
        passing = changed(model, batch, al.Zero(weights.at("output")))

        assert near(changed(model, batch, al.Zero(both)), passing, logits(model, batch))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_stacked_experts_are_refused_where_they_pass(name: str) -> None:
    """A point inside stacked experts is an error before anything changes: no hook sees a single expert."""
    model = base(name)
    lens, before = al.Lens(model), snapshot(model)
    expert = next(site for site in language(model, "down_proj") if site.expert is not None)
    for kind in ("output", "gated"):
        change = al.Zero(Point(expert, kind))
        with pytest.raises(LensError, match="expert"), lens.intervene(al.Zero(lens.sites), change):
            pytest.fail("the block was entered")

    assert same(before, snapshot(model))


# ---------------------------------------------------------------- knockout


def attentions(model: nn.Module, batch: Batch, *changes: object) -> tuple[Tensor, ...]:
    """Return the attention weights of each layer, which only eager attention returns."""
    with torch.no_grad(), al.Lens(model).intervene(*changes):  # type: ignore[arg-type]
        found: tuple[Tensor, ...] = model(**batch, use_cache=False, output_attentions=True).attentions
    return found


def eager(name: str, which: Any = base) -> nn.Module:
    model: nn.Module = BY_NAME[name].build()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


KNOCKED = ("llama", "phi3", "gpt2", "mixtral", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3",
           "idefics3", "internvl", "qwen2_audio", "qwen2_5_omni")  # fmt: skip


def cut(model: nn.Module, source: Any, target: Any, *, layers: tuple[int, ...] = (0, 1)) -> al.Knockout:
    sites = al.Lens(model).sites.where(tower="language", role="o_proj", param="weight")
    return al.Knockout(al.Sites(s for s in sites if s.layer in layers), source=source, target=target)


@pytest.mark.parametrize("name", KNOCKED)
def test_a_knockout_takes_attention_away(name: str) -> None:
    """A knockout leaves no attention weight from the last token to the source; the others sum to one."""
    model, batch = eager(name), BY_NAME[name].batch()
    family = BY_NAME[name]
    source: Any = family.media[0] if family.media else 0
    seen = attentions(model, batch, cut(model, source, "last", layers=(1,)))
    before = attentions(model, batch)
    keys = (
        family.span(batch, source) if family.media else torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    )
    if not family.media:
        keys[0, 2], keys[1, 0] = True, True
    for row in range(2):
        assert before[1][row, :, -1][:, keys[row]].sum() > 1e-4
        assert 0 == seen[1][row, :, -1][:, keys[row]].abs().max()
    own = batch["attention_mask"].bool()

    assert torch.equal(before[0], seen[0])
    assert torch.equal(
        before[1][:, :, :-1][own[:, :-1].unsqueeze(1).expand(-1, 4, -1)],
        seen[1][:, :, :-1][own[:, :-1].unsqueeze(1).expand(-1, 4, -1)],
    )
    assert torch.allclose(torch.ones(()), seen[1].sum(-1)[:, :, -1], atol=1e-5)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2_vl", "gpt2"])
def test_a_knockout_is_a_mask_made_by_hand(name: str, way: str) -> None:
    """A knockout in all layers equals a four-dimensional mask made by hand."""
    model, batch = BY_NAME[name].build(), BY_NAME[name].batch()
    model.set_attn_implementation(way)  # type: ignore[operator]
    own = batch["attention_mask"].bool()
    length = own.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & own[:, None, :]
    first = own & (own.cumsum(1) == 2)  # the second token of each row
    later = own & ~first
    blocked = first[:, None, :] & later[:, :, None]
    by_hand = allowed & ~blocked | torch.eye(length, dtype=torch.bool)
    added = torch.zeros(by_hand.shape).masked_fill(~by_hand, torch.finfo(torch.float32).min)[:, None]
    where = {"position_ids": positions(model, batch)} if name != "gpt2" else {}
    masked = {**batch, "attention_mask": added, **where}
    found = changed(model, {**batch, **where}, cut(model, 1, "prompt"))

    assert torch.allclose(logits(model, masked)[own], found[own], rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model, {**batch, **where})[own], found[own], rtol=0, atol=1e-3)


def positions(model: nn.Module, batch: Batch) -> Tensor:
    """Return the position ids, which the model can't derive from a four-dimensional mask."""
    if hasattr(model, "model") and hasattr(model.model, "get_rope_index"):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
        found: Tensor = model.model.get_rope_index(**{name: batch[name] for name in names})[0]  # type: ignore[operator]
        return found
    return torch.arange(batch["input_ids"].shape[1])[None].expand(2, -1)


def longer(batch: Batch, tokens: Tensor) -> Batch:
    """Return a batch continued with some tokens."""
    fill = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    zeros = {name: torch.zeros_like(tokens) for name in ("token_type_ids", "mm_token_type_ids")}
    every = {**fill, **zeros}
    return {name: torch.cat([t, every[name]], 1) if name in every else t for name, t in batch.items()}


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2_audio", "gemma3"])
def test_a_knockout_holds_at_each_step_of_generation(name: str, way: str) -> None:
    """Generation under a knockout gives the tokens of whole passes with the same positions blocked."""
    model, batch = BY_NAME[name].build(), doubled(BY_NAME[name].batch())
    model.set_attn_implementation(way)  # type: ignore[operator]
    count, tokens = batch["input_ids"].shape[1], torch.empty(1, 0, dtype=torch.long)
    for step in range(SETTINGS["max_new_tokens"]):
        new, whole = tuple(range(count, count + step)), longer(batch, tokens)
        said = changed(model, whole, cut(model, (1, 2, 3), new))
        assert differ(said[:, -1], logits(model, whole)[:, -1]) == (step > 0)
        tokens = torch.cat([tokens, said[:, -1:].argmax(-1)], 1)
    with al.Lens(model).intervene(cut(model, (1, 2, 3), "generated")):
        found = model.generate(**batch, **SETTINGS, min_new_tokens=4)  # type: ignore[operator]

    assert torch.equal(tokens, found[:, count:])


def test_what_is_cut_from_itself_still_sees_itself() -> None:
    """A position blocked from all keys still attends to itself, so that its softmax is defined."""
    model, batch = eager("llama"), BY_NAME["llama"].batch()
    seen = attentions(model, batch, cut(model, "prompt", "prompt"))

    own = batch["attention_mask"].bool()
    for layer in seen:
        assert torch.equal(torch.ones(own.sum(), 4), layer.diagonal(dim1=2, dim2=3).transpose(1, 2)[own])


# ---------------------------------------------------------------- padding, steps, spans


@pytest.mark.parametrize("name", [name for name in FEW if not BY_NAME[name].decodes])
def test_padding_does_not_count(name: str) -> None:
    """The mean over a padded batch leaves the padding out."""
    family = BY_NAME[name]
    model, batch = base(name), family.batch()
    lens = al.Lens(model)
    where = points(model, "residual")[-1:]
    values = lens.record(where, batch)[where[0]].values  # type: ignore[union-attr]
    expected = values[batch["attention_mask"].bool()].double().mean(0)

    for keep in ("values", "mean", "second"):
        assert torch.allclose(
            expected, lens.record(where, batch, keep=keep)[where[0]].mean, rtol=0, atol=1e-6
        )


def test_a_step_steers_each_position_of_its_span() -> None:
    """A vector added to the generated positions alone leaves the prompt unchanged."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    where = {span: points(model, "residual", span=span)[:1] for span in (None, "generated", "prompt")}
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3
    recorded = {}
    for span, at in where.items():
        with lens.intervene(al.Steer(at, vector=vector)), lens.record(where[None]) as one:
            model.generate(**batch, **SETTINGS)  # type: ignore[operator]
        recorded[span] = one[where[None][0]].values  # type: ignore[union-attr]
    prompt = batch["input_ids"].shape[1]
    with lens.record(where[None]) as one:
        model.generate(**batch, **SETTINGS)  # type: ignore[operator]
    plain = one[where[None][0]].values[:, :prompt]  # type: ignore[union-attr]

    own = batch["attention_mask"].bool()
    assert torch.equal(plain, recorded["generated"][:, :prompt])
    assert torch.equal((plain + vector)[own], recorded["prompt"][:, :prompt][own])
    assert torch.equal(recorded[None][:, :prompt][own], recorded["prompt"][:, :prompt][own])


def test_interventions_see_what_those_before_them_left() -> None:
    """Interventions apply in the order given, in one block or in nested blocks."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    where = points(model, "gated")
    ones = torch.ones(96)
    add, double = al.Steer(where, vector=ones), al.Scale(where, factor=2.0)
    with lens.intervene(add, double), lens.record(where[:1]) as first:
        logits(model, batch)
    with lens.intervene(double), lens.intervene(add), lens.record(where[:1]) as second:
        logits(model, batch)
    plain = lens.record(where[:1], batch)[where[0]].values  # type: ignore[union-attr]

    assert torch.equal((plain + 1) * 2, first[where[0]].values)  # type: ignore[union-attr]
    assert torch.equal(plain * 2 + 1, second[where[0]].values)  # type: ignore[union-attr]


def test_a_recording_can_be_of_weights_that_are_changed() -> None:
    """A recording inside a block of changed weights has the activations of the changed model."""
    model, donor, batch = base("llama"), tuned("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    where = points(model, "residual")
    with lens.intervene(al.Transplant(lens.sites, donor=donor)):
        inside = lens.record(where, batch)
    outside = al.Lens(donor).record(where, batch)

    assert all(torch.equal(outside[point].values, inside[point].values) for point in where)  # type: ignore[union-attr]


def test_sites_of_other_towers_have_no_positions_of_the_text() -> None:
    """A text span at a site of the vision tower is an error on entering the block."""
    model = base("qwen2_5_vl")
    lens = al.Lens(model)
    site: Site = lens.sites.where(tower="vision", role="gate_proj")[0]
    with pytest.raises(LensError, match="positions"), lens.intervene(al.Zero(Point(site, "gated", "image"))):
        pytest.fail("the block was entered")
