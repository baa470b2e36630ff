"""Unusual caches, masks, streams and heads: the right positions are chosen, or an error says why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError, NoSuchSite
from affectlens.sites import Point, Points
from tests.lens.families import BY_NAME, Batch, base, logits
from tests.lens.hooks.test_hook_restoring import hooks
from tests.lens.test_families import changed
from tests.numbers import differ
from tests.tiny_models import tiny

SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
STATIC = {"cache_implementation": "static", "disable_compile": True}


def attention(model: nn.Module) -> al.Sites:
    return al.Lens(model).sites.where(tower="language", role="o_proj", param="weight")


def spoken(model: nn.Module, batch: Batch, change: object, **settings: Any) -> Tensor:
    with al.Lens(model).intervene(change):  # type: ignore[arg-type]
        found: Tensor = model.generate(**batch, **SETTINGS, **settings)  # type: ignore[operator]
    return found


def changes(model: nn.Module) -> dict[str, object]:
    sites = attention(model)
    return {
        "numbers": al.Knockout(sites, source=(1, 2), target="generated"),
        "last": al.Knockout(sites, source=(1, 2), target="last"),
        "prompt": al.Knockout(sites, source="prompt", target="generated"),
        "generated": al.Scale(sites.at("heads", span="generated"), factor=-2.0),
        "tokens": al.Scale(sites.at("heads", span=(0, 2)), factor=-2.0),
        "from the end": al.Scale(sites.at("heads", span=-2), factor=-2.0),
    }


@pytest.mark.parametrize("kind", ["numbers", "last", "prompt", "generated", "tokens", "from the end"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_vl"])
def test_a_cache_of_fixed_size_changes_no_span(name: str, kind: str) -> None:
    """With a static cache, whose masks do not show the padding, a span has the same positions."""
    model, batch = base(name), BY_NAME[name].batch()
    change, before = changes(model)[kind], hooks(model)
    found = spoken(model, batch, change, **STATIC)

    assert torch.equal(spoken(model, batch, change), found)
    assert before == hooks(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_vl"])
def test_without_a_span_a_cache_of_fixed_size_changes_nothing(name: str) -> None:
    """With a static cache, changes of weights and of all positions apply in every step."""
    model, batch = base(name), BY_NAME[name].batch()
    sites = attention(model)
    for change in (al.Scale(sites.at("heads"), factor=-2.0), al.Scale(sites, factor=-2.0)):
        assert torch.equal(spoken(model, batch, change), spoken(model, batch, change, **STATIC))


@pytest.mark.parametrize("kind", ["numbers", "last", "prompt", "generated", "tokens", "from the end"])
@pytest.mark.parametrize("settings", [{"prefill_chunk_size": 3}, {"use_cache": False}])
def test_a_prompt_in_pieces_and_steps_without_a_cache_change_no_span(
    settings: dict[str, Any], kind: str
) -> None:
    """A prompt that fills the cache in pieces is no answer, and a step without a cache no new prompt."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    change = changes(model)[kind]

    assert torch.equal(spoken(model, batch, change), spoken(model, batch, change, **settings))


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gpt_neox", "opt", "codegen", "mpt"])
def test_a_mask_that_says_what_is_hidden_is_not_read_the_other_way_round(model_type: str) -> None:
    """A knockout cuts the right pair of positions, or is an error where true means hidden, as in MPT."""
    model = tiny(model_type)
    batch = {"input_ids": torch.arange(3, 10)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    change = al.Knockout(attention(model), source=0, target="last")
    if model_type == "mpt":
        with pytest.raises(LensError, match="mask"):
            changed(model, batch, change)
        return
    moved = (changed(model, batch, change) - logits(model, batch)).abs().amax(-1)[0]

    assert moved[-1] > 1e-4
    assert moved[:-1].max() < 1e-5


@pytest.mark.parametrize("model_type", ["deepseek_v4", "hy_v4"])
def test_a_stream_of_several_is_changed_at_its_positions(model_type: str) -> None:
    """In a residual of shape (batch, position, stream, feature), a span still selects positions."""
    model = tiny(model_type)
    batch = {"input_ids": torch.arange(3, 10)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    points = al.Lens(model).sites.where(tower="language", layer=0)[:1].at("residual", span="last")
    moved = (changed(model, batch, al.Scale(points, factor=-2.0)) - logits(model, batch)).abs().amax(-1)[0]

    assert moved[-1] > 1e-4
    assert moved[:-1].max() < 1e-5


def test_a_head_of_keys_is_no_head_of_queries() -> None:
    """A head of keys or values is shared: with two for four query heads, the second is the last two."""
    model, batch = BY_NAME["llama"].build(num_key_value_heads=2), BY_NAME["llama"].batch()
    lens, out = al.Lens(model), attention(model)[0]
    for role in ("k_proj", "v_proj"):
        site = lens.sites.where(role=role, param="weight")[0].at(head=1)
        with pytest.raises(LensError, match="share"):
            changed(model, batch, al.Zero(Point(site, "heads")))
    value = lens.sites.where(role="v_proj", param="weight")[0].at(head=1)
    both = Points(Point(out.at(head=head), "heads") for head in (2, 3))
    found = changed(model, batch, al.Zero(value))

    assert torch.equal(changed(model, batch, al.Zero(both)), found)
    assert differ(logits(model, batch), found)
    for head in range(4):
        apart = Point(lens.sites.where(role="q_proj", param="weight")[0].at(head=head), "heads")
        same = Point(out.at(head=head), "heads")
        assert torch.equal(changed(model, batch, al.Zero(same)), changed(model, batch, al.Zero(apart)))


@pytest.mark.parametrize(
    "change",
    [
        al.Zero,
        lambda points: al.Scale(points, factor=2.0),
        lambda points: al.Steer(points, vector=torch.ones(7)),
    ],
)
def test_a_mask_is_no_activation(change: Callable[[Points], object]) -> None:
    """Only a knockout changes an attention mask: zeros in a mask would not mean what they seem to."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    with pytest.raises(NoSuchSite, match="no point 'attention'"):
        changed(model, batch, change(attention(model).at("attention")))


def test_a_model_is_not_run_beside_itself() -> None:
    """A patch from a lens on the same model is an error, and leaves no hook."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    points, before = attention(model).at("heads"), hooks(model)
    with pytest.raises(LensError, match="itself"):
        changed(model, batch, al.Patch(points, source=al.Lens(model)))

    assert before == hooks(model)


def test_a_block_can_be_entered_again_but_not_within_itself() -> None:
    """A block can be entered twice in a row; entered inside itself it is an error that changes nothing."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    before, hooked = logits(model, batch), hooks(model)
    for change in (al.Zero(attention(model)), al.Zero(attention(model).at("heads"))):
        block = lens.intervene(change)
        for _ in range(2):
            with block:
                assert differ(before, logits(model, batch))
            assert torch.equal(before, logits(model, batch))
        with pytest.raises(LensError, match="already active"), block, block:
            pytest.fail("it was entered twice")
        assert torch.equal(before, logits(model, batch))
        assert hooked == hooks(model)


def test_beams_are_rows_of_their_own() -> None:
    """In a search with three beams, a span selects the same tokens in each beam."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    settings = {**SETTINGS, "num_beams": 3}
    rows = torch.arange(2).repeat_interleave(3)
    wide = {name: tensor[rows] for name, tensor in batch.items()}
    points = attention(model).at("heads", span=(0, 2))
    lens = al.Lens(model)
    expected = lens.record(points, wide)
    with lens.record(points) as recorded:
        model.generate(**batch, **settings)  # type: ignore[operator]

    for point in points:
        assert torch.allclose(
            expected[point].values,  # type: ignore[union-attr]
            recorded[point].values[:, : expected[point].values.shape[1]],  # type: ignore[union-attr]
            rtol=0,
            atol=1e-5,
        )
