"""Norms of heads pass (batch, head, position, feature) in some models, positions first in others."""

import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from tests.tiny_models import tiny

HEADS = 4


def with_heads(model_type: str) -> nn.Module:
    model = tiny(model_type)
    heads = model.config.get_text_config().num_attention_heads  # type: ignore[union-attr, operator]
    assert heads == HEADS
    return model


def at_last(model: nn.Module, ids: Tensor, *, heads_first: bool) -> Tensor:
    """Return the logits where the last position of each norm of queries is doubled, by plain torch."""

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        new = output.clone()
        place = new[:, :, -1] if heads_first else new[:, -1]
        place *= 2
        return new

    norms = [one for name, one in model.named_modules() if name.endswith("q_norm")]
    handles = [one.register_forward_hook(double) for one in norms]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("model_type", "heads_first"), [("gemma3_text", True), ("qwen3", False)])
@pytest.mark.parametrize("length", [HEADS - 1, HEADS, HEADS + 1])
def test_positions_are_told_from_heads(model_type: str, heads_first: bool, length: int) -> None:
    """Also where there are as many heads as positions."""
    model, ids = with_heads(model_type), torch.arange(2, 2 + length)[None]
    lens = al.Lens(model)
    norms = lens.sites.where(role="q_norm").at("output", span="last")
    with torch.no_grad(), lens.intervene(al.Scale(norms, factor=2.0)):
        found = model(input_ids=ids).logits

    assert torch.equal(at_last(model, ids, heads_first=heads_first), found)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3"])
def test_batches_of_other_lengths_read_back(model_type: str) -> None:
    """Positions are padded on the left, before heads and features."""
    lens = al.Lens(with_heads(model_type))
    norms = lens.sites.where(role="q_norm", layer=0).at("output")
    batches = [{"input_ids": torch.arange(2, 2 + length)[None]} for length in (5, 7)]
    both = lens.record(norms, *batches)[norms[0]]
    alone = [lens.record(norms, batch)[norms[0]].values for batch in batches]  # type: ignore[union-attr]

    assert both.values.shape[:2] == (2, 7)  # type: ignore[union-attr]
    for row, expected in zip(both.values, alone, strict=True):  # type: ignore[union-attr]
        assert torch.equal(row[-expected.shape[1] :], expected[0])
