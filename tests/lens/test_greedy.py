"""Answers are greedy whatever the model's own generation settings say, unless the caller asks otherwise."""

import warnings
from typing import Any

import pytest
import torch

import affectlens as al
from affectlens.errors import LensError, Remark
from affectlens.lens.greedy import settings_for
from affectlens.lens.inputs.padding import padding_id
from affectlens.lens.running import started
from tests.lens.families import BY_NAME

DEMO = al.load_demo()
TASK = DEMO.tasks[1]
EXAMPLES = TASK.examples[:2]
SETTINGS: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 3,
    "temperature": 0.1,
    "top_k": 4,
    "return_dict_in_generate": True,
    "output_scores": True,
    "min_new_tokens": 3,
    "min_length": 50,
    "max_length": 4,
    "guidance_scale": 3.0,
    "suppress_tokens": list(range(100)),
    "begin_suppress_tokens": list(range(100)),
    "bad_words_ids": [[token] for token in range(3, 100)],
    "sequence_bias": [[[23], -50.0]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 2,
    "num_return_sequences": 2,
    "prompt_lookup_num_tokens": 2,
    "penalty_alpha": 0.6,
    "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "exponential_decay_length_penalty": (0, 5.0),
    "stop_strings": ["a"],
    "cache_implementation": "static",
    "use_cache": False,
    "max_time": 0.0,
    "renormalize_logits": True,
    "dola_layers": "high",
    "token_healing": True,
}


@pytest.fixture(scope="module")
def lens() -> al.Lens:
    return al.load(DEMO.base, dtype="float32")


def answers(lens: al.Lens, **more: Any) -> list[str]:
    return lens.generate(*EXAMPLES, prompt=TASK.prompt, max_new_tokens=3, **more)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_model_changes_no_answer(name: str, lens: al.Lens) -> None:
    """It is named once where it could change one, and the model has it again afterwards."""
    config: Any = lens.model.generation_config
    expected, before = answers(lens), getattr(config, name)
    lens.told.clear()
    setattr(config, name, SETTINGS[name])
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", Remark)
            found = answers(lens)
            assert expected == found == answers(lens)
        assert lens.model.generation_config is config
        assert SETTINGS[name] == getattr(config, name)
    finally:
        setattr(config, name, before)
    words = [str(one.message) for one in caught if issubclass(one.category, Remark)]
    silent = ("max_length", "cache_implementation", "use_cache", "return_dict_in_generate", "output_scores",
              "num_return_sequences")  # fmt: skip
    assert (name not in silent) == len(words)
    assert all(f"{name}={SETTINGS[name]!r}" in one for one in words)


@pytest.mark.parametrize("name", ["whisper", "t5_gated", "qwen2_5_omni"])
def test_encoder_decoders_and_parts_are_greedy_too(name: str) -> None:
    """The settings of every model inside the model are put back to their defaults."""
    model, batch = BY_NAME[name].build(), BY_NAME[name].batch()
    lens = al.Lens(model)
    lens.run(batch)
    from affectlens.lens.greedy import _configured, greedily
    from affectlens.lens.running import _generate, answering, typed

    given = typed(model, started(model, batch))
    usual = {"max_new_tokens": 4, "pad_token_id": padding_id(model, None) or 0}

    def generated() -> torch.Tensor:
        with greedily(model):
            return _generate(answering(model))(**given, **settings_for(lens, None), **usual)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)
        expected = generated()
        parts = _configured(model)
        for part in parts:
            for setting in ("suppress_tokens", "begin_suppress_tokens"):
                setattr(part.generation_config, setting, expected.unique().tolist())
            part.generation_config.return_dict_in_generate = True
        assert parts
        assert torch.equal(expected, generated())


def test_the_caller_may_ask_for_other_settings(lens: al.Lens) -> None:
    """Sampling follows torch's seed; a setting that is asked for needs no remark."""
    torch.manual_seed(0)
    sampled = answers(lens, settings={"do_sample": True, "temperature": 50.0})
    torch.manual_seed(0)

    assert sampled == answers(lens, settings={"do_sample": True, "temperature": 50.0})
    assert sampled != answers(lens)
    first = int(lens.logits(EXAMPLES[0], prompt=TASK.prompt).argmax())
    assert answers(lens)[0] != answers(lens, settings={"suppress_tokens": [first]})[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_return_sequences": 2}, "one text per example"),
        ({"return_dict_in_generate": True}, "one text per example"),
        ({"use_cache": False}, "step by step"),
        ({"cache_implementation": "static"}, "step by step"),
        ({"max_new_tokens": 3}, "max_new_tokens="),
        ({"no_such_setting": 3}, "no_such_setting"),
    ],
)
def test_settings_that_can_not_be_followed_are_refused(
    settings: dict[str, Any], words: str, lens: al.Lens
) -> None:
    """And unknown ones, as transformers refuses them."""
    with pytest.raises(LensError, match=words):
        lens.generate(*EXAMPLES, prompt=TASK.prompt, settings=settings)
