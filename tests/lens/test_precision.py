"""Logits in float32: from a model in half precision, with each kind of output matrix."""

from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.lens import precision
from tests.lens.inputs.test_batching import made, task

HALVES = (torch.bfloat16, torch.float16)


def hidden(lens: al.Lens, example: al.Example) -> torch.Tensor:
    """Return what goes into the output matrix at the last position."""
    seen: list[torch.Tensor] = []
    head: nn.Module = lens.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lens.logits(example)
    handle.remove()
    return seen[-1][0, -1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2", "cohere"])
def test_logits_are_computed_in_float32(family: str, dtype: torch.dtype) -> None:
    """They are the float32 product, with bias, soft cap and scale, and not numbers of half precision."""
    lens = made(family, dtype)
    head: nn.Linear = lens.model.get_output_embeddings()  # type: ignore[operator]
    example = task().examples[0]
    expected = hidden(lens, example).float() @ head.weight.float().T
    if head.bias is not None:
        expected = expected + head.bias.float()
    config = lens.model.config
    if cap := getattr(config, "final_logit_softcapping", None):
        expected = torch.tanh(expected / cap) * cap
    expected = expected * getattr(config, "logit_scale", 1)
    found = lens.logits(example)[0]

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, found.to(dtype).float())


def test_labels_that_tied_are_told_apart() -> None:
    """In bfloat16, rows of the output matrix that are nearly equal give one logit; in float32 they don't."""
    lens = made("llama", torch.bfloat16)
    a, b = (lens.tokenizer.convert_tokens_to_ids(label) for label in "ab")
    head = lens.model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
    with torch.no_grad():
        at = hidden(lens, task().examples[0])
        head[b] = head[a]
        one = int(at.abs().argmin())
        head[b, one] *= 1 + 2**-5
        rounded = at @ head[[a, b]].T
        expected = float(at[one].float() * (head[b, one] - head[a, one]).float())
    assert rounded[0] == rounded[1]
    assert expected != 0

    found = lens.logits(task().examples[0])[0]
    assert pytest.approx(expected, rel=0.05) == float(found[b] - found[a])


def test_float32_models_are_left_as_they_are() -> None:
    """No hook is installed, so their logits are transformers' own to the bit."""
    lens = made("llama")
    batch = lens.prepare(*task().examples)

    assert torch.equal(lens.model(**batch).logits[:, -1:].float(), lens.run(batch))


@pytest.mark.parametrize("rows", [1, 7, 10**9])
def test_large_matrices_are_converted_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of rows at a time gives the same logits."""
    lens = made("llama", torch.bfloat16)
    expected = lens.logits(*task().examples)
    monkeypatch.setattr(precision, "_AT_ONCE", rows * 64)

    torch.testing.assert_close(lens.logits(*task().examples), expected, atol=1e-5, rtol=1e-5)


ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False),
    "saved": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapted_matrices_too(kind: str) -> None:
    """A LoRA over the output matrix, and a trained copy of it."""
    lens = made("llama", torch.bfloat16)
    wrapped = peft.get_peft_model(lens.model, ADAPTERS[kind](), autocast_adapter_dtype=False)
    found = al.Lens(wrapped, lens.processor).logits(task().examples[0])
    with torch.no_grad():
        coarse = wrapped(**al.Lens(wrapped, lens.processor).prepare(task().examples[0])).logits[:, -1]

    torch.testing.assert_close(found, coarse.float(), atol=0.02, rtol=0.02)
    assert not torch.equal(found, found.bfloat16().float())


def test_interventions_see_and_change_the_logits() -> None:
    """A rewrite of the output matrix's output comes after it was computed in float32."""
    lens = made("llama", torch.bfloat16)
    head = lens.sites.where(role="lm_head").at("output")
    expected = lens.logits(task().examples[0])
    with lens.intervene(al.Scale(head, factor=2.0)):
        found = lens.logits(task().examples[0])

    torch.testing.assert_close(found, 2 * expected)
    assert not lens.model.get_output_embeddings()._forward_hooks  # type: ignore[operator, union-attr]
