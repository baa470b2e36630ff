"""One head of an attention's mask, and the streams of a layer that passes several."""

import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError
from affectlens.sites import Site, Sites
from tests.lens.families import BY_NAME, Batch, base, lens_of, logits
from tests.numbers import differ
from tests.tiny_models import tiny

CAUSAL = ("llama", "phi3", "gpt2", "qwen2_moe", "qwen2_5_vl", "gemma3")
HEADS = 4


def own_output(model: nn.Module, site: Site, batch: Batch) -> Tensor:
    """Return what each head writes into o_proj, (batch, position, head, feature)."""
    where = Sites([site]).at("heads")
    values = lens_of(model).record(where, batch)[where[0]].values  # type: ignore[union-attr]
    return values.unflatten(-1, (HEADS, -1))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_knockout_of_one_head_changes_that_head_alone(name: str) -> None:
    """In its layer, the other heads are equal to the bit; the head is that of a knockout of all heads."""
    model, batch = base(name), BY_NAME[name].batch()
    lens = lens_of(model)
    site = lens.sites.where(tower="language", role="o_proj", layer=0, param="weight")[0]
    plain = own_output(model, site, batch)
    with lens.intervene(al.Knockout([site], source=(0, 1), target="last")):
        every = own_output(model, site, batch)
    for head in range(HEADS):
        with lens.intervene(al.Knockout([site.at(head=head)], source=(0, 1), target="last")):
            one = own_output(model, site, batch)
        others = [other for other in range(HEADS) if other != head]

        assert not differ(one[:, :, others], plain[:, :, others])
        assert not differ(one[:, :, head], every[:, :, head])
        assert differ(one[:, -1, head], plain[:, -1, head])


def test_knockouts_of_heads_add_up() -> None:
    """Knockouts of each head, in one intervention or in several, are the knockout of the attention."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = lens_of(model)
    site = lens.sites.where(role="o_proj", layer=1, param="weight")[0]
    heads = [site.at(head=head) for head in range(HEADS)]
    with lens.intervene(al.Knockout([site], source=0, target="last")):
        expected = logits(model, batch)
    with lens.intervene(al.Knockout(heads, source=0, target="last")):
        together = logits(model, batch)
    with lens.intervene(*(al.Knockout([head], source=0, target="last") for head in heads)):
        apart = logits(model, batch)

    assert not differ(expected, together)
    assert torch.equal(together, apart)


def test_a_head_of_keys_that_queries_share_has_no_mask() -> None:
    """Several heads of queries look at one head of k_proj: the error names where to choose them."""
    lens = lens_of(base("gemma3"))
    keys = lens.sites.where(tower="language", role="k_proj", layer=0, param="weight")[0]

    with (
        pytest.raises(LensError, match=r"2 query heads share this head.*heads of o_proj"),
        lens.intervene(al.Knockout([keys.at(head=0)], source=0, target="last")),
    ):
        pass


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("length", [3, 4])
def test_streams_are_no_rows(rows: int, length: int) -> None:
    """Gemma-3n passes four streams before the batch, also where rows and positions are four."""
    model = tiny("gemma3n_text")
    lens = al.Lens(model)
    point = lens.sites.where(role="down_proj", layer=0, param="weight").at("residual", span="last")
    batch = {"input_ids": torch.arange(2, 2 + rows * length).reshape(rows, length)}
    passed: list[Tensor] = []
    layer = model.get_submodule("model.layers.0")

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        passed.append(output)
        new = output.clone()
        new[:, :, -1] *= 2
        return new

    handle = layer.register_forward_hook(double)
    expected = logits(model, batch)
    handle.remove()
    with lens.intervene(al.Scale(point, factor=2.0)):
        found = logits(model, batch)
    recorded = lens.record(point, batch)[point[0]].values  # type: ignore[union-attr]

    assert torch.equal(expected, found)
    assert torch.equal(passed[0][:, :, -1].movedim(0, 1).flatten(1), recorded[:, 0])
    with (
        pytest.raises(LensError, match="256 features pass there, but the vector has 64"),
        lens.intervene(al.Steer(point, vector=[1.0] * 64)),
    ):
        pass
