"""Positions are found by what a module computes, even where there are as many heads as tokens."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError
from affectlens.sites import Point, Points, Site
from tests.lens.families import BY_NAME, logits
from tests.tiny_models import tiny

# Norms of heads see (batch, head, position, feature), (batch, position, head, feature),
# (batch · position, head, feature) or (batch, position, feature).
NORMED = ("gemma3_text", "exaone4", "apertus", "hunyuan_v1_dense", "qwen3", "persimmon", "gemma3n_text",
          "qwen3_next", "lfm2", "chameleon", "olmo2", "minimax_m2", "phi")  # fmt: skip
OTHER = 11  # tokens, unlike any number of heads or streams


def built(name: str) -> nn.Module:
    """Build a tiny model; Phi normalizes heads only if asked to, with a kernel that orders memory anew."""
    if name != "phi":
        return tiny(name)
    config = transformers.PhiConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        qk_layernorm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.PhiForCausalLM(config).eval()


def tokens(length: int, rows: int = 1) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + rows * length).reshape(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def norms(lens: al.Lens) -> list[Site]:
    found = [site for site in lens.sites if site.role in ("q_norm", "k_norm") and site.tower == "language"]
    return [site for site in found if site.layer == found[-1].layer and site.param == "weight"]


def by_hand(model: nn.Module, module: nn.Module, length: int) -> Tensor:
    """Return the logits with zeros at the last position, which a pass of another length shows."""
    shapes: list[tuple[int, ...]] = []
    with torch.no_grad():
        handle = module.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
        model(**tokens(OTHER), use_cache=False)
        handle.remove()
        axis = shapes[0].index(OTHER)

        def zeroed(_: nn.Module, args: object, out: Tensor) -> Tensor:
            out = out.clone()
            out.movedim(axis, 0)[-1] = 0
            return out

        handle = module.register_forward_hook(zeroed)
        found: Tensor = model(**tokens(length), use_cache=False).logits
        handle.remove()
    return found


@pytest.mark.parametrize("name", NORMED)
def test_as_many_heads_as_tokens_are_no_positions(name: str) -> None:
    """Zeros at the last token are the same as by hand, whatever the number of tokens, in a fresh lens."""
    for length in (2, 4, 5):
        model = built(name)
        lens = al.Lens(model)
        for site in norms(lens):
            with lens.intervene(al.Zero(Point(site, "output", "last"))):
                found = logits(model, tokens(length))

            assert torch.equal(found, by_hand(model, lens.module(site), length)), (site, length)
            assert not torch.equal(found, logits(model, tokens(length)))


@pytest.mark.parametrize("name", NORMED)
def test_norms_of_heads_are_recorded_over_batches_of_unequal_length(name: str) -> None:
    """Values are padded on the left, rows are those of each batch alone, and sums count them all."""
    lens = al.Lens(built(name))
    batches = [tokens(5), tokens(7, rows=2), tokens(4)]
    for site in norms(lens):
        where = Points([Point(site)])
        alone = [lens.record(where, batch)[where[0]] for batch in batches]
        found = lens.record(where, *batches)[where[0]]
        sums = lens.record(where, *batches, keep="mean")[where[0]]

        assert found.values.shape[:2] == (4, 7)
        assert torch.equal(found.rows, torch.cat([one.rows for one in alone]))
        assert sums.count == len(found.rows)
        assert torch.equal(found.values[0, 2:], alone[0].values[0])


@pytest.mark.parametrize(
    ("name", "part"), [("recurrent_gemma", "temporal_block.conv_1d"), ("qwen3_next", "linear_attn.norm")]
)
def test_padding_is_refused_where_positions_are_unknown(name: str, part: str) -> None:
    """A causal convolution computes more than a row per token, a norm one per token and head."""
    lens, batch = al.Lens(tiny(name)), tokens(6, rows=2)
    site = next(s for s in lens.sites if f".{part}." in s.parameter and s.param == "weight")
    where = Points([Point(site)])
    padded = {**batch, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}

    assert len(lens.record(where, batch)[where[0]].rows) >= 12
    with pytest.raises(LensError, match="one length at a time"):
        lens.record(where, padded)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_streams_are_not_taken_for_a_batch(rows: int) -> None:
    """Of Gemma-3n's four streams, each is changed at the chosen positions of each row."""
    for length in (4, 6):
        model, batch = tiny("gemma3n_text"), tokens(length, rows)
        lens = al.Lens(model)
        site = lens.sites.where(role="down_proj", layer=0)[0]
        where = Points([Point(site, "residual", "last")])
        found = lens.record(where, batch)[where[0]].values
        with lens.intervene(al.Zero(where)):
            changed = logits(model, batch)

        assert found.shape == (rows, 1, 4 * 64)
        assert torch.equal(changed[:, :-1], logits(model, batch)[:, :-1])

        def zeroed(_: nn.Module, args: object, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, :, -1] = 0
            return out

        handle = model.get_submodule("layers.0" if hasattr(model, "layers") else "model.layers.0")
        hook = handle.register_forward_hook(zeroed)
        expected = logits(model, batch)
        hook.remove()

        assert torch.equal(changed, expected)


def test_learning_a_layout_leaves_no_trace() -> None:
    """The short pass that shows a layout is not seen by other blocks, and a model's notes stay."""
    model, batch = BY_NAME["qwen3_vl"].build(), BY_NAME["qwen3_vl"].batch()
    lens = al.Lens(model)
    site = norms(lens)[0]
    logits(model, batch)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with lens.record(lens.sites.where(role="down_proj", tower="language").at("output")) as other:
        with lens.intervene(al.Zero(Point(site, "output", "last"))):
            pass
        with pytest.raises(LensError, match="nothing passed"):
            other[other.points[0]]

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            assert value is before[name][key]
