"""A lens runs its model in evaluation mode and puts every mode back; a user's own forward keeps it."""

import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import LensError
from tests.lens.families import BY_NAME, base, logits

NAMES = ("llama", "gpt2", "qwen2_5_vl", "whisper", "t5_gated")


def dropping(name: str) -> nn.Module:
    """A family with dropout wherever its config has it."""
    model = BY_NAME[name].build()
    for module in model.modules():
        for setting in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, setting, None), float):
                setattr(module, setting, 0.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_of_a_model_in_training_answers_as_in_evaluation(name: str) -> None:
    """Runs, recordings and probes; and a module that was frozen in evaluation mode stays in it."""
    model, batch = dropping(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    points = lens.sites.where(tower="language", role="o_proj", param="weight").at("output")
    expected, recorded = lens.run(batch), lens.record(points, batch)
    model.train()
    next(model.children()).eval()
    before = modes(model)
    found, again = lens.run(batch), lens.record(points, batch)

    assert torch.equal(expected, found)
    for point in points:
        assert torch.equal(recorded[point].values, again[point].values)  # type: ignore[union-attr]
    with lens.intervene(al.Scale(points, factor=0.5)):
        lens.run(batch)
        assert before == modes(model)
    assert before == modes(model)
    assert {True, False} == set(before)


def test_the_modes_come_back_after_an_error() -> None:
    """Also after an interrupt in the middle of the pass."""
    model = BY_NAME["llama"].build()
    lens = al.Lens(model)
    model.train()
    with pytest.raises(LensError):
        lens.run({"input_ids": torch.tensor([[10**6]])})
    assert all(modes(model))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)  # type: ignore[union-attr, index]
    with pytest.raises(KeyboardInterrupt):
        lens.run(BY_NAME["llama"].batch())
    handle.remove()
    assert all(modes(model))


def test_evaluation_and_generation_leave_a_model_in_training() -> None:
    """Both answers of a task are those in evaluation mode."""
    demo = al.load_demo()
    lens, task = al.load(demo.base, dtype="float32"), demo.tasks[1].head(4)
    answers = {
        way: al.evaluate(lens, task, answer=way, max_new_tokens=1) for way in ("constrained", "greedy")
    }
    lens.model.train()
    for module in lens.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    for way, expected in answers.items():
        found = al.evaluate(lens, task, answer=way, max_new_tokens=1)
        assert expected.frame.equals(found.frame)
    assert all(modes(lens.model))


@pytest.mark.parametrize("training", [False, True])
def test_an_intervention_works_in_a_training_loop(training: bool) -> None:
    """The user's own pass keeps its mode, and has the intervention and its gradients."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    points = lens.sites.where(role="o_proj", param="weight").at("output")
    expected = logits(base("llama"), batch)
    model.train(training)
    with lens.intervene(al.Zero(points)):
        loss = model(**batch).logits.float().sum()
        assert modes(model) == [training] * len(modes(model))
        loss.backward()

    weights = [layer.self_attn.o_proj.weight.grad for layer in model.model.layers]  # type: ignore[union-attr]
    assert all(grad is None or not grad.any() for grad in weights)
    assert model.model.layers[0].mlp.down_proj.weight.grad.any()  # type: ignore[union-attr, index]
    assert torch.allclose(expected, logits(model.eval(), batch), rtol=0, atol=1e-5)
