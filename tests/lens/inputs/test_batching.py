"""Batches: an example gives in a batch what it gives alone, whatever the model does with padding."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import LensError
from affectlens.lens.inputs.batching import batches
from affectlens.lens.inputs.padding import padding_id
from tests.lens.processors import tokenizer
from tests.tiny_models import tiny

# Models that read padding as text, number positions from it, or mask it out.
READING = ("rwkv", "recurrent_gemma", "xlstm")
SHIFTED = ("trocr", "bart", "pegasus")
MASKING = (
    "mamba",
    "falcon_mamba",
    "jamba",
    "lfm2",
    "qwen3_next",
    "gpt2",
    "opt",
    "mpt",
    "llama",
    "roberta",
    "mixtral",
)
TEXTS = ("I am so good", "the movie was bad and long and bad", "good", "so it goes on", "fine")


def made(family: str, dtype: torch.dtype = torch.float32) -> al.Lens:
    """A tiny model whose logits depend on every token, and a tokenizer of characters."""
    model = tiny(family).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                drawn = torch.Generator().manual_seed(parameter.numel())
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.08)
    return al.Lens(model.to(dtype), tokenizer())


def task(texts: tuple[str, ...] = TEXTS) -> al.Task:
    examples = (al.Example(str(n), "ab"[n % 2], text) for n, text in enumerate(texts))
    return al.Task("t", tuple(examples), ("a", "b"))


def calls(model: nn.Module) -> list[tuple[int, ...]]:
    """Return a list to which the shape of each input is added from now on."""
    found: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [*READING, *SHIFTED, *MASKING])
def test_a_batch_gives_what_each_gives_alone(family: str) -> None:
    """Scores, logits and generated answers are the same for one example, a batch, and any size of batch."""
    lens = made(family)
    alone = al.evaluate(lens, task(), batch_size=1).frame

    for size in (2, 5):
        together = al.evaluate(lens, task(), batch_size=size).frame
        assert alone["id"].tolist() == together["id"].tolist()
        np.testing.assert_allclose(together["logp"], alone["logp"], atol=1e-4)
    examples = task().examples
    expected = torch.cat([lens.logits(one) for one in examples])
    torch.testing.assert_close(lens.logits(*examples), expected, atol=1e-4, rtol=1e-4)
    assert (family not in MASKING) is lens.reads_padding


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "reads"), [("rwkv", True), ("trocr", True), ("llama", False), ("mixtral", False)]
)
def test_rounding_is_not_taken_for_padding(family: str, reads: bool, dtype: torch.dtype) -> None:
    """In half precision a batch rounds in another way, which is no reason to group by length."""
    lens = made(family, dtype)
    lens.logits(*task().examples)

    assert reads is lens.reads_padding


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_measured_once_and_only_if_it_has_to_be() -> None:
    """Examples of one length are not padded; later tasks of the same lens are not measured again."""
    lens = made("rwkv")
    passes = calls(lens.model)
    lens.logits(*task(("so", "no")).examples)
    assert [2] == [rows for rows, _ in passes]
    assert None is lens.reads_padding
    lens.logits(*task(("so", "long", "no")).examples)
    assert lens.reads_padding

    passes.clear()
    lens.logits(*task(("so", "long", "no", "wide", "on")).examples)
    assert [3, 2] == [rows for rows, _ in passes]  # so no on | long wide


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "mamba", "gpt2"])
def test_answers_of_one_length_are_generated_alike(family: str) -> None:
    """Without padding, too: RWKV's rows would change each other."""
    lens = made(family)
    with torch.no_grad():
        for parameter in lens.model.parameters():
            parameter.mul_(4)
    examples = task(("I am so good", "I am so evil")).examples
    alone = [lens.generate(one, max_new_tokens=6)[0] for one in examples]

    assert alone == lens.generate(*examples, max_new_tokens=6)


@pytest.mark.parametrize("family", ["rwkv", "llama"])
def test_answers_are_generated_alike(family: str) -> None:
    """Greedy answers of a batch come in the order of the examples, each as alone."""
    lens = made(family)
    expected = [lens.generate(one, max_new_tokens=4)[0] for one in task().examples]

    assert expected == lens.generate(*task().examples, max_new_tokens=4)
    assert 1 < len(set(expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["rwkv", "llama"])
def test_recordings_are_alike_and_in_order(family: str) -> None:
    """Rows of a recording are the examples in their order."""
    lens = made(family)
    site = lens.sites.where(layer=1)[:1].at("output", span="last")
    values = lens.record(site, *task().examples)[site[0]].values
    alone = [lens.record(site, one)[site[0]].values for one in task().examples]

    torch.testing.assert_close(values, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_interventions_do_not_see_the_measuring() -> None:
    """A block that evaluates counts and rewrites the passes of the evaluation alone."""
    lens = made("rwkv")
    points = lens.sites.where(layer=1)[:1].at("output")
    seen: list[int] = []

    class Counting:
        def rewrites(self, live: Any) -> dict[al.sites.Point, Callable[..., torch.Tensor]]:
            return dict.fromkeys(points, self.count)

        def count(self, values: torch.Tensor, moment: Any) -> torch.Tensor:
            seen.append(len(values))
            return values

    with lens.intervene(Counting()):
        lens.logits(*task().examples)

    assert lens.reads_padding
    assert [1, 1, 2, 1] == seen  # 'good' and 'fine' have one length


@pytest.mark.filterwarnings("ignore")
def test_a_changed_model_is_not_remembered() -> None:
    """Zeroed weights may hide what a model does with padding; the next evaluation measures again."""
    lens = made("rwkv")
    with lens.intervene(al.Zero(lens.sites.where(role="embed_tokens"))):
        al.evaluate(lens, task())
    assert None is lens.reads_padding

    lens.logits(*task().examples)
    assert lens.reads_padding


def test_a_tokenizer_without_a_mask() -> None:
    """Where padding can't be told apart, examples are grouped by length."""
    lens = made("llama")
    lens.processor.model_input_names = ["input_ids"]
    alone = al.evaluate(lens, task(), batch_size=1).frame

    np.testing.assert_allclose(al.evaluate(lens, task()).frame["logp"], alone["logp"], atol=1e-4)


@pytest.mark.parametrize("place", ["pad", "end"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_beyond_the_embedding_is_replaced(family: str, place: str) -> None:
    """A tokenizer whose padding or end token was added later pads with a token that the model has."""
    lens = made(family)
    expected = al.evaluate(lens, task(), batch_size=1).frame
    written = lens.generate(*task().examples, max_new_tokens=3)
    outside = tokenizer()
    outside.add_special_tokens({"pad_token": "<added>"} if place == "pad" else {"eos_token": "<added>"})
    if place == "end":
        outside.pad_token = None
    rows = lens.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    assert rows <= outside.convert_tokens_to_ids("<added>")
    other = al.Lens(lens.model, outside)

    assert 0 <= padding_id(other.model, outside) < rows  # type: ignore[operator]
    np.testing.assert_allclose(al.evaluate(other, task()).frame["logp"], expected["logp"], atol=1e-4)
    assert written == other.generate(*task().examples, max_new_tokens=3)


def test_no_padding_is_an_error() -> None:
    """A tokenizer with neither padding nor end token says what to set."""
    lens = made("llama")
    lens.processor.pad_token = lens.processor.eos_token = None
    with pytest.raises(LensError, match="no padding token and no end token; set"):
        al.evaluate(lens, task())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_order", [False, True])
def test_every_example_is_in_one_batch(in_order: bool) -> None:
    """Batches are no larger than asked, and hold each example once; in order where it is asked for."""
    lens = made("rwkv")

    def split(size: int) -> Iterator[tuple[int, ...]]:
        make = partial(lens.prepare, prompt="{text}")
        for numbers, batch in batches(
            lens, task().examples, make=make, tensors=dict, size=size, in_order=in_order
        ):
            assert len(numbers) == len(batch["input_ids"]) <= size
            assert batch["attention_mask"].all()
            yield numbers

    for size in (1, 2, 5):
        found = [number for numbers in split(size) for number in numbers]
        assert list(range(len(TEXTS))) == (found if in_order else sorted(found))
