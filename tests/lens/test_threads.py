"""A block belongs to its thread, runs of several threads take turns, and copies never keep a block."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import affectlens as al
from affectlens.errors import LensError, NoSuchSite
from tests.lens.families import BY_NAME, logits, tuned

Made = Callable[[al.Lens], AbstractContextManager[Any]]


def sites(lens: al.Lens) -> al.Sites:
    return lens.sites.where(role="down_proj", layer=0, param="weight", tower="language")


BLOCKS: dict[str, Made] = {
    "weights": lambda lens: lens.intervene(al.Scale(sites(lens), factor=2.0)),
    "activations": lambda lens: lens.intervene(al.Scale(sites(lens).at("output"), factor=2.0)),
    "recording": lambda lens: lens.record(sites(lens).at("output")),
    "pair": lambda lens: lens.paired(tuned("llama")).tuned(),
}


def elsewhere(function: Callable[[], object]) -> object:
    """Call a function in another thread; return its result or its error."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join(60)
    return found[0]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_an_error_in_other_threads(block: str) -> None:
    """Through the lens, through the model or a part of it, and for a block of their own; after it, none."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    plain = lens.run(batch)
    uses: list[Callable[[], object]] = [
        lambda: lens.run(batch),
        lambda: logits(model, batch),
        lambda: model.model(**batch),  # type: ignore[operator]
        lambda: BLOCKS[block](lens).__enter__(),
        lambda: al.Lens(model).run(batch),
        lambda: lens.parameter(sites(lens)[0]),
    ]
    with BLOCKS[block](lens):
        for use in uses:
            error = elsewhere(use)
            assert isinstance(error, LensError)
            assert "thread 'MainThread' is inside a block" in str(error)
            assert "'other'" in str(error)
        lens.run(batch)

    found = elsewhere(lambda: lens.run(batch))
    assert isinstance(found, torch.Tensor)
    assert torch.equal(plain, found)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "whisper", "qwen2_5_omni"])
def test_a_block_belongs_to_its_thread_in_other_families(name: str) -> None:
    """Multimodal models, encoder-decoders and parts of omni models too."""
    model, batch = BY_NAME[name].build(), BY_NAME[name].batch()
    lens = al.Lens(model)
    outputs = lens.sites.where(role="o_proj", tower="language", param="weight")
    with lens.intervene(al.Scale(outputs[:1], factor=2.0)):
        for use in (lambda: lens.run(batch), lambda: logits(model, batch)):
            assert isinstance(elsewhere(use), LensError)
    assert isinstance(elsewhere(lambda: lens.run(batch)), torch.Tensor)


def test_an_error_ends_the_hold_of_a_thread() -> None:
    """In the block, or on entering it."""
    lens, batch = al.Lens(BY_NAME["llama"].build()), BY_NAME["llama"].batch()
    with pytest.raises(KeyError), lens.intervene(al.Zero(sites(lens).at("output"))):
        raise KeyError
    with pytest.raises(NoSuchSite), lens.intervene(al.Transplant(sites(lens), donor=BY_NAME["gpt2"].build())):
        pytest.fail("the block was entered")

    assert isinstance(elsewhere(lambda: lens.run(batch)), torch.Tensor)


def test_runs_of_several_threads_take_turns() -> None:
    """Without a block, threads wait for each other; a model in training is put back for the last of them."""
    model, batch = BY_NAME["llama"].build(attention_dropout=0.5), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    expected = lens.run(batch)
    model.train()
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.extend(lens.run(batch) for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert 20 == len(found)
    assert all(torch.allclose(expected, one, rtol=0, atol=1e-5) for one in found)
    assert all(module.training for module in model.modules())


COPIES: dict[str, Callable[[al.Lens], object]] = {
    "deepcopy of the model": lambda lens: copy.deepcopy(lens.model),
    "deepcopy of the lens": copy.deepcopy,
    "deepcopy of a part": lambda lens: copy.deepcopy(lens.model.model),
    "pickle of the model": lambda lens: pickle.dumps(lens.model),
    "pickle of the lens": pickle.dumps,
    "torch.save": lambda lens: torch.save(lens.model, io.BytesIO()),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_inside_a_block_is_refused(kind: str, block: str) -> None:
    """It would keep the weights and hooks of the block for good."""
    lens = al.Lens(BY_NAME["llama"].build())
    with BLOCKS[block](lens), pytest.raises(LensError, match="before the block or after it"):
        COPIES[kind](lens)
    COPIES[kind](lens)


def test_a_copy_of_a_lens_is_a_lens_of_its_own() -> None:
    """Changes of one don't reach the other, and both are restored."""
    lens, batch = al.Lens(BY_NAME["llama"].build()), BY_NAME["llama"].batch()
    plain = lens.run(batch)
    for other in (copy.deepcopy(lens), pickle.loads(pickle.dumps(lens))):
        with other.intervene(al.Scale(sites(lens), factor=-2.0)):
            assert torch.equal(plain, lens.run(batch))
            assert not torch.allclose(plain, other.run(batch), atol=1e-3)
        assert torch.allclose(plain, other.run(batch), rtol=0, atol=1e-5)


def test_what_the_model_has_now_is_looked_up() -> None:
    """A replaced parameter, a replaced module, another dtype and loaded weights."""
    lens = al.Lens(BY_NAME["llama"].build())
    site, layer = sites(lens)[0], lens.model.model.layers[0].mlp  # type: ignore[union-attr, index]
    assert lens.parameter(site).any()
    layer.down_proj.weight = torch.nn.Parameter(torch.zeros_like(layer.down_proj.weight))
    assert not lens.parameter(site).any()
    layer.down_proj = torch.nn.Linear(layer.down_proj.in_features, layer.down_proj.out_features, bias=False)
    assert torch.equal(layer.down_proj.weight, lens.parameter(site))
    lens.model.to(torch.bfloat16)
    assert "bfloat16" == lens.checkpoint.dtype(site)
    with lens.intervene(al.Zero(site)):
        assert not layer.down_proj.weight.any()
    assert layer.down_proj.weight.any()


def test_nothing_keeps_a_model_that_was_held() -> None:
    """The record of who holds it is weak."""
    lens, batch = al.Lens(BY_NAME["llama"].build()), BY_NAME["llama"].batch()
    with lens.intervene(al.Scale(sites(lens).at("output"), factor=2.0)):
        lens.run(batch)
    model = weakref.ref(lens.model)
    del lens
    gc.collect()

    assert model() is None
