"""Under gradient checkpointing a pass is recorded once, and a change that may not be repeated is refused."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import affectlens as al
from affectlens.errors import LensError
from affectlens.lens import Recording, Statistics
from affectlens.sites import Points
from tests.lens.families import BY_NAME, Batch
from tests.lens.hooks.test_hook_restoring import hooks

FAMILIES = ("llama", "gpt2", "qwen2_5_vl", "gemma3", "qwen2_audio", "t5_gated")
KINDS = ("output", "input", "residual")


@contextmanager
def training(name: str, *, reentrant: bool | None) -> Iterator[nn.Module]:
    """Build a model that trains, checkpointed unless `reentrant` is None."""
    model = BY_NAME[name].build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renames the method
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    yield model


def answer(model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = model(**batch, use_cache=False).logits[:, -1, :10]
    return found.sum()


def middle(lens: al.Lens, kind: str) -> Points:
    stack = "decoder" if any(site.stack == "decoder" for site in lens.sites) else None
    role = next(role for role in ("down_proj", "fc2") if any(site.role == role for site in lens.sites))
    return lens.sites.where(tower="language", stack=stack, role=role, layer=0, param="weight").at(kind)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_point_is_recorded_once_a_pass(name: str, reentrant: bool) -> None:
    """With a backward pass inside the block, values and sums are those of the forward pass alone."""
    batch = BY_NAME[name].batch()
    with training(name, reentrant=reentrant) as model:
        lens = al.Lens(model)
        for kind in KINDS:
            where = middle(lens, kind)
            model.eval()
            expected = lens.record(where, batch)
            for keep in ("values", "mean"):
                model.train()
                with lens.record(where, keep=keep) as found:
                    answer(model, batch).backward()
                for point in where:
                    rows = expected[point].rows
                    if keep == "mean":
                        sums = found[point]
                        assert isinstance(sums, Statistics)
                        assert sums.count == len(rows)
                    else:
                        assert found[point].rows.shape == rows.shape
                        torch.testing.assert_close(found[point].rows, rows)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own, without gradients
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_in_a_checkpointed_part_is_refused(name: str, reentrant: bool) -> None:
    """The error is raised in the forward pass; without gradients or in evaluation nothing is refused."""
    batch = BY_NAME[name].batch()
    with training(name, reentrant=reentrant) as model:
        lens = al.Lens(model)
        where, before = middle(lens, "input"), hooks(model)
        model.train()
        with (
            pytest.raises(LensError, match="gradient_checkpointing_disable"),
            lens.intervene(al.Scale(where, factor=-2.0)),
        ):
            answer(model, batch)
        with lens.intervene(al.Scale(where, factor=-2.0)), torch.no_grad():
            answer(model, batch)  # no backward pass can follow
        model.eval()
        with lens.intervene(al.Scale(where, factor=-2.0)):
            changed = lens.run(batch)

        assert hooks(model) == before
        assert not torch.equal(changed, lens.run(batch))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_beside_the_checkpointed_parts_holds(name: str, reentrant: bool) -> None:
    """A residual stream passes between the checkpointed layers: gradients are those without checkpoints."""
    batch, found = BY_NAME[name].batch(), []
    for way in (None, reentrant):
        with training(name, reentrant=way) as model:
            lens = al.Lens(model)
            model.train()
            with lens.intervene(al.Scale(middle(lens, "residual"), factor=-2.0)):
                total = answer(model, batch)
            total.backward()
            where = middle(lens, "residual")[0].site
            gradient = lens.module(where).weight.grad
            assert gradient is not None
            found.append(gradient)

    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_user_may_checkpoint_the_whole_model(reentrant: bool) -> None:
    """A checkpoint around the call of a model is seen too."""
    model, batch = BY_NAME["llama"].build().train(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    where, start = middle(lens, "output"), torch.zeros(1, requires_grad=True)

    def run(zero: Tensor) -> Tensor:
        return answer(model, batch) + zero.sum()

    with lens.record(where) as found:
        checkpoint(run, start, use_reentrant=reentrant).backward()

    assert found[where[0]].values.shape[0] == 2
    with pytest.raises(LensError, match="checkpointing"), lens.intervene(al.Zero(where)):
        checkpoint(run, start, use_reentrant=reentrant)


def test_gradients_of_reentrant_checkpoints_are_refused() -> None:
    """With use_reentrant=True the recorded values have no graph, so a gradient would be zero."""
    batch = BY_NAME["llama"].batch()
    with training("llama", reentrant=True) as model:
        lens = al.Lens(model)
        where = middle(lens, "output")
        model.train()
        with (
            pytest.raises(LensError, match="use_reentrant=False"),
            Recording(lens, where, gradients=True),
        ):
            answer(model, batch)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_backward_pass_after_changed_weights_is_refused(reentrant: bool | None) -> None:
    """Inside the block gradients are those of the new weights; after it they would be of others."""
    batch = BY_NAME["llama"].batch()
    with training("llama", reentrant=reentrant) as model:
        lens = al.Lens(model)
        sites = lens.sites.where(role="down_proj", layer=0, param="weight")
        model.train()
        with lens.intervene(al.Scale(sites, factor=3.0)):
            answer(model, batch).backward()
            late = answer(model, batch)
        gradient = lens.module(lens.sites.where(role="up_proj", layer=0)[0]).weight.grad
        found = None if gradient is None else gradient.clone()
        with pytest.raises(LensError, match="inside the block"):
            late.backward()
        answer(model, batch).backward()  # another pass, after the block

    other = BY_NAME["llama"].build()
    module = al.Lens(other).module(sites[0])
    with torch.no_grad():
        module.weight *= 3.0
    other.train()
    answer(other, batch).backward()
    expected = al.Lens(other).module(lens.sites.where(role="up_proj", layer=0)[0]).weight.grad

    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected)
