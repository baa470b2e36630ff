"""What TransformerLens calls a point is the point: by the values that pass there, not by how it sounds."""

import pytest
import torch
from torch import Tensor

from affectlens.errors import LensError, NoSuchSite
from affectlens.lens.doors.bridge import bridge, bridge_input
from affectlens.lens.doors.hook_points import hook_name, point_of
from affectlens.sites import Point, Points, Site
from tests.lens.doors.test_bridge import FUSED, eager, of
from tests.lens.families import BY_NAME

# role → the kinds of points that are looked at, in every layer
KINDS = {
    "gate_proj": ("input", "output", "pre_activation", "gated", "residual"),
    "up_proj": ("input", "output", "pre_activation", "gated"),
    "down_proj": ("input", "output", "gated", "pre_activation", "residual"),
    "fc1": ("input", "output", "pre_activation", "gated"),
    "fc2": ("input", "output", "gated", "residual"),
    "q_proj": ("output", "heads", "residual"),
    "k_proj": ("output",),
    "v_proj": ("output",),
    "o_proj": ("input", "output", "heads", "residual"),
    "norm": ("residual",),
}
AROUND = {"embed_tokens": ("output",), "lm_head": ("input", "output"), "norm": ("input", "output")}
FAMILIES = (
    "llama", "phi3", "gpt2", "llava", "gemma3", "smolvlm", "internvl", "qwen2_vl", "qwen2_audio",
    "qwen2_5_omni",
)  # fmt: skip


def named_points(name: str) -> list[Point]:
    """Every point of a language model that has a name."""
    found: list[Point] = []
    for table, inside in ((KINDS, True), (AROUND, False)):
        for role, kinds in table.items():
            try:
                sites = of(eager(name), role)
            except NoSuchSite:
                continue
            found += [Point(s, kind) for s in sites for kind in kinds if (s.layer is not None) == inside]
    # K and V of fewer heads than Q share them; which head of Q goes where is then not theirs to say.
    return [p for p in found if not (p.kind == "heads" and p.site.role in ("k_proj", "v_proj"))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_name_is_that_of_the_point_by_its_values(name: str) -> None:
    """What the cache of a bridge has under a point's name is what passes the point, media and all."""
    lens, batch, points = eager(name), BY_NAME[name].batch(), named_points(name)
    recorded, built = lens.record(Points(points), batch), bridge(lens)
    with torch.no_grad():
        _, cache = built.run_with_cache(**bridge_input(built, batch))

    for point in points:
        expected, actual = recorded[point].values, as_features(cache[hook_name(point)])
        if name in FUSED:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        else:
            assert torch.equal(expected, actual), point
    assert {"mlp.hook_post", "attn.hook_z", "hook_resid_post"} <= {
        hook_name(p).partition(".0.")[2] for p in points if p.site.layer == 0
    }


def as_features(cached: Tensor) -> Tensor:
    """Heads side by side, as modules have them."""
    return cached.flatten(2) if cached.ndim == 4 else cached


def test_the_hooks_of_the_field_have_their_names() -> None:
    """The names that papers use are those of the points that they mean."""
    expected = {
        "blocks.3.mlp.hook_pre": ("gate_proj", "pre_activation"),
        "blocks.3.mlp.hook_pre_linear": ("up_proj", "output"),
        "blocks.3.mlp.hook_post": ("down_proj", "gated"),
        "blocks.3.attn.hook_z": ("o_proj", "heads"),
        "blocks.3.hook_resid_post": ("o_proj", "residual"),
    }

    assert expected == {
        hook_name(Point(Site("language", role, layer=3), kind)): (role, kind)
        for role, kind in expected.values()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_point_is_found_by_its_name(name: str) -> None:
    """There and back is a point of the same name, at a site that the model has."""
    lens = eager(name)

    for point in named_points(name):
        found = point_of(hook_name(point), lens.sites)
        assert hook_name(point) == hook_name(found)
        assert found.site in lens.sites


@pytest.mark.parametrize(
    ("point", "why"),
    [
        (Point(Site("vision", "fc1", layer=0)), "not for vision"),
        (Point(Site("language", "gate_proj", layer=0, expert=3), "pre_activation"), "inside experts"),
        (Point(Site("language", "gate_proj", layer=0, label="mlp.shared_expert")), "inside experts"),
        (Point(Site("language", "q_proj", layer=0, stack="decoder")), "two stacks"),
        (
            Point(Site("language", "norm", layer=0, label="input_layernorm")),
            "no hook name in TransformerLens",
        ),
        (Point(Site("language", "q_proj", layer=0), "input"), "no hook name in TransformerLens"),
        (Point(Site("language", "o_proj", layer=0), "attention"), "no hook name in TransformerLens"),
    ],
    ids=str,
)
def test_what_has_no_name_is_told(point: Point, why: str) -> None:
    """Towers, experts, stacks, and what TransformerLens shows nowhere under a name of its own."""
    with pytest.raises(LensError, match=why):
        hook_name(point)


def test_what_is_no_point_is_told() -> None:
    """A hook that we have no point for, and one of a module that the model does not have."""
    with pytest.raises(LensError, match=r"'blocks\.0\.mlp\.hook_pst'.*Did you mean 'mlp\.hook_post'"):
        point_of("blocks.0.mlp.hook_pst")
    with pytest.raises(LensError, match="no point in affectlens"):
        point_of("blocks.0.mlp.hook_pre_linear", eager("gpt2").sites)
    with pytest.raises(LensError, match="no point in affectlens"):
        point_of("blocks.0.mlp.hook_pre", eager("mixtral").sites)
    assert "fc1" == point_of("blocks.0.mlp.hook_pre", eager("gpt2").sites).site.role
