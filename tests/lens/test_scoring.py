"""Labels of several tokens are scored from one pass over the prompt, as prompt and label in one pass are."""

import pytest
import torch
import transformers
from torch import nn

import affectlens as al
from affectlens.lens import scoring
from affectlens.lens.inputs.choices import Choices
from affectlens.lens.running import rows, started
from tests.lens.families import BY_NAME, base, tuned
from tests.small_models import TEXT

LABELS = ((7,), (9, 4), (11, 5, 6, 8))
OTHER = ((7, 8), (9, 4, 3), (11,))  # a prompt whose end merges with its labels has other tokens


def asked(family: str, model: nn.Module) -> Choices:
    """Return a batch of a family with labels of one to four tokens."""
    batch = started(model, BY_NAME[family].batch())
    return Choices(batch, (LABELS, *[OTHER] * (rows(batch) - 1)))


def lengths(model: nn.Module) -> list[int]:
    """Note how many tokens each forward pass of a model computes from now on."""
    found: list[int] = []
    forward = type(model).forward

    def counted(*args: object, **kwargs: torch.Tensor) -> object:
        found.append(kwargs["input_ids"].shape[1])
        return forward(model, *args, **kwargs)

    counted.__wrapped__ = forward  # type: ignore[attr-defined]
    model.forward = counted
    return found


@pytest.mark.parametrize("family", BY_NAME)
def test_from_the_cache_as_in_one_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-probabilities are those of prompt and label run together, in every family."""
    model = base(family)
    choices = asked(family, model)
    found = scoring.label_logps(model, choices)
    monkeypatch.setattr(scoring, "_rewinds", lambda cache, count: False)
    together = scoring.label_logps(model, choices)

    torch.testing.assert_close(together, found, rtol=1e-4, atol=1e-4)
    first = al.Lens(model).run(choices.batch)[:, -1].log_softmax(-1)[0, 7]
    torch.testing.assert_close(first, found[0, 0], rtol=1e-4, atol=1e-4)


def test_a_cache_with_a_state_of_its_own_is_not_taken_back() -> None:
    """MiniMax's linear attention keeps a state that can't be cropped, in a subclass of the common cache."""
    config = transformers.MiniMaxConfig(
        **{**TEXT, "num_local_experts": 2, "block_size": 4},
        layer_types=["linear_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM(config).eval()
    prompt = torch.tensor([[3, 5, 8, 2, 9]])
    found = scoring.label_logps(model, Choices({"input_ids": prompt}, (LABELS,)))
    for label, logp in zip(LABELS, found[0], strict=True):
        logits = model(input_ids=torch.cat([prompt, torch.tensor([label])], dim=1)).logits[0]
        expected = logits.log_softmax(-1)[range(4, 4 + len(label)), label].sum()
        torch.testing.assert_close(expected, logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "gemma3"])
def test_the_prompt_runs_once(family: str) -> None:
    """One pass over the prompt, then one over the further tokens of each label."""
    model = base(family)
    choices = asked(family, model)
    passes = lengths(model)
    scoring.label_logps(model, choices)
    del model.forward

    assert [choices.batch["input_ids"].shape[1], 1, 2, 3] == passes


@pytest.mark.parametrize("kind", ["zero", "steer", "patch", "knockout"])
def test_interventions_reach_every_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under interventions on activations too, the two ways of scoring agree."""
    lens = al.Lens(base("llama"))
    choices = asked("llama", lens.model)
    sites = lens.sites.where(tower="language", role="down_proj")
    points = sites.at("residual", span="generated")[:1]
    everywhere = sites.at("residual")[:1]
    change = {
        "zero": al.Zero(points),
        "steer": al.Steer(points, vector=torch.ones(lens.parameter(sites[0]).shape[0])),
        "patch": al.Patch(everywhere, source=al.Lens(tuned("llama"))),
        "knockout": al.Knockout(lens.sites.where(role="o_proj")[:1], source=0, target="generated"),
    }[kind]
    plain = scoring.label_logps(lens.model, choices)
    with lens.intervene(change):
        found = scoring.label_logps(lens.model, choices)
    monkeypatch.setattr(scoring, "_rewinds", lambda cache, count: False)
    with lens.intervene(change):
        together = scoring.label_logps(lens.model, choices)

    torch.testing.assert_close(together, found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[:, 1:], found[:, 1:], atol=1e-3)
