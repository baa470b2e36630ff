"""Models of every kind are prepared, run, answered by and judged in the same way."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import affectlens as al
from affectlens.errors import LensError
from affectlens.lens.live import answering, config_of, device_of
from affectlens.lens.running import _decoded, decoder_ids
from affectlens.tasks.written_answers import read_answer
from tests.lens.families import BY_NAME, base
from tests.lens.inputs.tokenizers import KINDS, wrapped
from tests.lens.processors import processor
from tests.tiny_models import shrink, tiny

SHORT, LONG = al.Example("1", "glad", "a"), al.Example("2", "sad", "what is it that you feel today?")
TASK = al.Task("feeling", (SHORT, LONG), ("glad", "sad"))


@cache
def decoding(name: str) -> nn.Module:
    """An encoder-decoder that knows with what its decoder begins, as those that were trained do."""
    model = BY_NAME[name].build() if name in BY_NAME else tiny(name, "BartForConditionalGeneration")
    for part in (model.config, model.generation_config):
        part.decoder_start_token_id = 0
        part.forced_eos_token_id = part.eos_token_id = None
    return model


def with_adapter(model: nn.Module, task: str | None, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of what PEFT calls by its old name
        return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type=task, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_s_label_ends_where_the_word_ends(kind: str) -> None:
    """What a tokenizer writes before a label is part of it, what it writes behind is not."""
    tokenizer = wrapped(kind)
    ids = decoder_ids(decoding("t5"), tokenizer, label="happy")
    whole = tokenizer("happy")["input_ids"]

    assert list(ids) == (whole[:-1] if "ends" in kind else whole)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "t5gemma", "bart"])
def test_a_decoder_answers_after_its_first_token(name: str) -> None:
    """The logits are those of the model's own forward pass, padded or not."""
    model = decoding(name)
    lens = al.Lens(model, processor(name, template=False))
    ids = torch.tensor([lens.tokenizer(SHORT.text, add_special_tokens=True).input_ids])
    with torch.inference_mode():
        expected = model(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[:, -1]

    torch.testing.assert_close(expected, lens.logits(SHORT), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected[0], lens.logits(SHORT, LONG)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_are_what_a_decoder_goes_on_with(name: str) -> None:
    """The log-probability of a label of several tokens is that of each after those before it."""
    model = decoding(name)
    lens = al.Lens(model, processor(name, template=False))
    scores = al.evaluate(lens, TASK).to_pandas()
    label = lens.tokenizer.encode("sad")
    with torch.inference_mode():
        logits = model(
            input_ids=lens.prepare(LONG)["input_ids"], decoder_input_ids=torch.tensor([[0, *label]])
        ).logits
    logps = logits.log_softmax(-1)[0, range(len(label)), label]

    assert 3 == len(label)
    assert pytest.approx(float(logps.sum()), abs=1e-4) == scores.logp[1]


def test_a_decoder_writes_its_answer() -> None:
    """The answer begins after the first token, which is none of it."""
    lens = al.Lens(decoding("t5"), processor("t5", template=False))
    first = lens.logits(LONG).argmax(-1)

    assert lens.tokenizer.decode(first, skip_special_tokens=True) == lens.generate(LONG, max_new_tokens=1)[0]
    assert 2 == len(al.evaluate(lens, TASK, answer="greedy").to_pandas())


def test_a_decoder_without_a_beginning_is_told() -> None:
    """No token is guessed."""
    model = BY_NAME["t5"].build()
    for part in (model.config, model.generation_config):
        part.bos_token_id = part.decoder_start_token_id = None
    with pytest.raises(LensError, match="decoder_start_token_id or bos_token_id"):
        al.Lens(model, processor("t5", template=False)).prepare(SHORT)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama"])
def test_padding_shifts_no_position(name: str) -> None:
    """Also where positions are learned by their number."""
    model = base(name) if name in BY_NAME else tiny(name)
    lens = al.Lens(model, processor(name, template=False))

    torch.testing.assert_close(lens.logits(SHORT)[0], lens.logits(SHORT, LONG)[0], atol=1e-5, rtol=1e-5)
    assert lens.generate(SHORT) == lens.generate(SHORT, LONG)[:1]


@pytest.mark.parametrize(
    ("name", "task", "modules"),
    [
        ("llama", None, ["q_proj", "v_proj"]),
        ("llama", "CAUSAL_LM", ["q_proj", "v_proj"]),
        ("qwen2_5_vl", "CAUSAL_LM", ["q_proj"]),
        ("t5", "SEQ_2_SEQ_LM", ["q", "v"]),
    ],
)
def test_an_adapter_around_a_model_changes_nothing_but_weights(
    name: str, task: str | None, modules: list[str]
) -> None:
    """A new adapter does nothing: logits, answers and scores are those of the model alone."""
    model = decoding(name) if name == "t5" else base(name)
    alone = al.Lens(model, processor(name))
    expected = alone.logits(SHORT, LONG), alone.generate(SHORT, LONG), al.evaluate(alone, TASK)
    wrapped = with_adapter(_copy(model), task, target_modules=modules)
    lens = al.Lens(wrapped, processor(name))

    torch.testing.assert_close(expected[0], lens.logits(SHORT, LONG), atol=1e-5, rtol=1e-5)
    assert expected[1] == lens.generate(SHORT, LONG)
    torch.testing.assert_close(
        torch.tensor(expected[2].to_pandas().logp), torch.tensor(al.evaluate(lens, TASK).to_pandas().logp),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert config_of(model) == config_of(wrapped)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_()
    assert not torch.allclose(expected[0], lens.logits(SHORT, LONG), atol=1e-2)


def _copy(model: nn.Module) -> nn.Module:
    made: nn.Module = type(model)(model.config).eval()
    made.load_state_dict(model.state_dict())
    made.generation_config = model.generation_config
    return made


@cache
def omni() -> nn.Module:
    """A whole Qwen2.5-Omni, without the part that speaks."""
    config = CONFIG_MAPPING["qwen2_5_omni"]()
    shrink(config)
    config.enable_audio_output = False
    for path, value in BY_NAME["qwen2_5_omni"].changes.items():
        *sections, key = path.split(".")
        at = config.thinker_config
        for name in sections:
            at = getattr(at, name)
        setattr(at, key, value)
    return transformers.Qwen2_5OmniForConditionalGeneration(config).eval()  # type: ignore[no-any-return]


def test_of_a_whole_omni_model_the_thinker_answers() -> None:
    """Logits, answers and scores are the thinker's, with an adapter around it all too."""
    whole = omni()
    thinker, lens = (al.Lens(model, processor("qwen2_5_omni")) for model in (whole.thinker, whole))

    assert whole.thinker is answering(whole)
    assert torch.equal(thinker.logits(SHORT, LONG), lens.logits(SHORT, LONG))
    assert thinker.generate(SHORT, LONG) == lens.generate(SHORT, LONG)
    assert thinker.sites == lens.sites
    wrapped = with_adapter(whole, None, target_modules=["q_proj"])
    assert torch.equal(thinker.logits(SHORT), al.Lens(wrapped, processor("qwen2_5_omni")).logits(SHORT))


def test_input_goes_where_the_embedding_is() -> None:
    """Not to the first parameter, which may be a tower's."""
    model = base("llava")

    assert model.get_input_embeddings().weight.device == device_of(model)  # type: ignore[operator]
    assert torch.device("cpu") == device_of(nn.Module())


def test_a_lens_needs_no_config() -> None:
    """A module that was made by hand runs, where it takes what is prepared."""

    class Made(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.embed = nn.Embedding(256, 256)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(logits=self.embed(input_ids))

    lens = al.Lens(Made(), processor("llama"))
    assert (2, 256) == tuple(lens.logits(SHORT, LONG).shape)


def test_tokens_that_close_a_thought_are_kept_in_an_answer() -> None:
    """Where they are special tokens, an answer without them would begin with the thought."""
    tokens = wrapped("byte-level", None, "<think>", "</think>")
    written = "<think> so sad </think> happy<|im_end|>"
    ids = torch.tensor([tokens.encode(written, add_special_tokens=False)])

    (text,) = _decoded(tokens, ids)
    assert text == "<think> so sad </think> happy"
    assert read_answer(text, ("happy", "sad")) == "happy"
