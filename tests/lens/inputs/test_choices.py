"""Prompt and label are exactly the tokens that the model's own template gives."""

import re
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import affectlens as al
from affectlens.effects.evaluating import prepare_task
from affectlens.errors import LensError, Remark, TaskError
from affectlens.lens.asking import ask
from affectlens.lens.inputs.choices import choices
from affectlens.lens.inputs.rendering import DATE
from tests.lens.inputs.tokenizers import KINDS, wrapped

HOWTO = Path(__file__).parents[3] / "docs" / "howto" / "prompts.md"
LABELS = ("happy", "sad", "not good")
TEXT = "the movie was bad : which emotion is this"
_TURNS = "{% for m in messages %}"
_CHATML = _TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_CHATML_CUE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
# The shapes of public chat templates: where the cue ends, what stands around an answer, what becomes of the
# system turn.
TEMPLATES = {
    "chatml": _CHATML + _CHATML_CUE,
    "adds a system turn": "{% if messages[0].role != 'system' %}<|im_start|>system\nbe good<|im_end|>\n"
    "{% endif %}" + _CHATML + _CHATML_CUE,
    "begins with bos": "{{ bos_token }}" + _CHATML + _CHATML_CUE,
    "cue ends in a colon": _TURNS + "{{ m.role|capitalize }}: {{ m.content }}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    "cue ends in a space": _TURNS + "{{ m.role|capitalize }}: {{ m.content }}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}",
    "cue ends in a special token": _TURNS + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "no cue": "{{ bos_token }}" + _TURNS + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "no cue, spaces around": "{{ bos_token }}"
    + _TURNS
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content|trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "trims, refuses a system turn": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no') }}{% endif %}" + _TURNS + "<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content|trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "words as markers": _TURNS + "{% if m.role == 'user' %}### User:\n{{ m.content }}\n\n{% else %}"
    "### Assistant:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}",
    "vicuna": "{{ bos_token }}" + _TURNS + "{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == "
    "'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "other line feeds": _TURNS + "{{ m.role }}:\n\n{{ m.content }}\n\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}",
    "walks through parts": _TURNS + "{{ m.role|upper }}: " + _PARTS + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "names a channel": _TURNS + "<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|end|>final"
    "{% endif %}\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
    "{% endif %}",
    "an empty thought": _CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
}


def lens_of(tokenizer: Any) -> al.Lens:
    """Return a lens of a tiny model with a tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    return al.Lens(transformers.LlamaForCausalLM(config), tokenizer)


def examples_of(*messages: dict[str, Any]) -> tuple[al.Example, ...]:
    """Return two examples with the same chat."""
    return tuple(
        al.Example(number, label, messages=messages) for number, label in (("1", "happy"), ("2", "sad"))
    )


def shared(one: list[int], other: list[int]) -> int:
    """Return the length of the longest common prefix."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


@pytest.mark.parametrize("system", [False, True], ids=["", "with a system turn"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", TEMPLATES)
def test_prompt_and_label_are_those_of_transformers(shape: str, kind: str, system: bool) -> None:
    """Both come from apply_chat_template, cut at the longest common prefix and where the label ends."""
    tokenizer = wrapped(kind, TEMPLATES[shape])
    chat = [{"role": "system", "content": "be good"}] * system + [{"role": "user", "content": TEXT}]
    lens, task = lens_of(tokenizer), al.Task("t", examples_of(*chat), labels=LABELS)
    if system and "refuses" in shape:
        with pytest.raises(LensError, match="can't be rendered: TemplateError no"):
            prepare_task(lens, task)
        return
    form = {"tokenize": True, "return_dict": False, "enable_thinking": False}
    if "parts" in shape:
        chat = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
    said = [[{"type": "text", "text": label}] if "parts" in shape else label for label in LABELS]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **form)
    wholes = [
        tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": one}], **form) for one in said
    ]
    if "thought" in shape:  # this template leaves it out of past answers
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **{**form, "tokenize": False})
        wholes = [tokenizer.encode(text + label, add_special_tokens=False) for label in LABELS]
    start = min(shared(prompt, whole) for whole in wholes)
    prepared = prepare_task(lens, task)
    batch = prepared.batches[0]

    for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert prompt[:start] == row[mask].tolist()
    for label, whole, ids in zip(LABELS, wholes, prepared.labels, strict=True):
        assert list(ids) == whole[start : start + len(ids)]
        rest = tokenizer.decode(whole[start + len(ids) :], skip_special_tokens=True)
        assert tokenizer.decode(ids).replace(" ", "").endswith(label.replace(" ", ""))
        assert not rest.strip()
    assert len(set(prepared.labels)) == len(LABELS)


def test_the_docs_show_which_shapes_merge() -> None:
    """Each row of the table in the how-to states whether a token of the cue is scored with the label."""
    example = examples_of({"role": "user", "content": TEXT})[0]
    lines = [f"| template | {' | '.join(KINDS)} |", f"| --- |{' --- |' * len(KINDS)}"]
    for shape, template in TEMPLATES.items():
        cells = [shape]
        for kind in KINDS:
            lens = lens_of(wrapped(kind, template))
            with warnings.catch_warnings(action="ignore"):
                found = choices(
                    lens.prompt_format, [example], labels=LABELS, prompt="", config=lens.model.config
                )
            alone = lens.prepare(example)["input_ids"]
            merges = found.batch["input_ids"].shape[1] < alone.shape[1]
            cells.append("exact, merges" if merges else "exact")
        lines.append(f"| {' | '.join(cells)} |")

    assert "\n".join(lines) in HOWTO.read_text("utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_bare_text_is_continued_as_a_text(kind: str) -> None:
    """Without a template, a label is the next word; what begins a text is there, what ends it is not."""
    tokenizer = wrapped(kind)
    lens = lens_of(tokenizer)
    found = ask(lens, [al.Example("1", "happy", text="I am so")], labels=LABELS)
    whole = tokenizer("I am so happy")["input_ids"]
    ended = len(tokenizer("", add_special_tokens=True)["input_ids"]) == 2

    assert whole[: len(whole) - ended] == [*found.batch["input_ids"][0].tolist(), *found.labels[0][0]]


@pytest.mark.parametrize(
    ("text", "label", "whole"),
    [
        ("I am so", "happy", "I am so happy"),
        ("I am so", " happy", "I am so happy"),  # as evaluation harnesses write labels
        ("I am (", "happy", "I am (happy"),
        ("I am „", "happy", "I am „happy"),
        ("movie:", "happy", "movie: happy"),
        ("情绪：", "happy", "情绪：happy"),
        ("I am", "开心", "I am开心"),
    ],
)
def test_a_bare_text_gets_one_space_at_most(text: str, label: str, whole: str) -> None:
    """It stands before a new word, unless the label brings it, a bracket opens or the script has none."""
    tokenizer = wrapped("byte-level")
    found = ask(lens_of(tokenizer), [al.Example("1", label, text=text)], labels=(label, "sad"))

    assert tokenizer(whole)["input_ids"] == [*found.batch["input_ids"][0].tolist(), *found.labels[0][0]]


def test_a_boundary_that_merges_is_told_once() -> None:
    """The token that holds the end of the cue is scored with the label, and a remark says so."""
    lens = lens_of(wrapped("byte-level", TEMPLATES["cue ends in a space"]))
    task = al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=LABELS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        al.evaluate(lens, task)
        al.evaluate(lens, task)

    assert ["are one token" in str(one.message) for one in said if one.category is Remark] == [True]


def test_a_token_of_spaces_is_kept_where_offsets_leave_spaces_out() -> None:
    """Byte-level tokenizers may say of a space that ends the cue that it has no length."""
    tokenizer = wrapped("byte-level", TEMPLATES["cue ends in a space"])
    own = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trims = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", chat_template=tokenizer.chat_template
    )
    assert trims("a: ", return_offsets_mapping=True)["offset_mapping"][-1] == (3, 3)
    task = al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=LABELS)
    found, expected = (prepare_task(lens_of(one), task) for one in (trims, tokenizer))

    assert found.labels == expected.labels
    assert found.batches[0]["input_ids"].equal(expected.batches[0]["input_ids"])


@pytest.mark.parametrize("content", ["m.content", "m.content|trim", "m.content.lstrip()"])
def test_spaces_around_a_label_are_those_that_the_template_keeps(content: str) -> None:
    """Also where the template trims an answer and writes spaces of its own around it."""
    template = _TURNS + "{{ m.role }}: {{ " + content + " }} {{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer, labels = wrapped("byte-level", template), (" happy", "sad ", "not good")
    turn = {"role": "user", "content": TEXT}
    example = al.Example("1", "sad ", messages=(turn,))
    prepared = prepare_task(lens_of(tokenizer), al.Task("t", (example,), labels=labels))
    for label, ids in zip(labels, prepared.labels, strict=True):
        chat = [turn, {"role": "assistant", "content": label}]
        whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        found = [*prepared.batches[0]["input_ids"][0].tolist(), *ids]
        assert found == whole[: len(found)]
        assert label.strip() not in tokenizer.decode(whole[len(found) :])


def test_rows_are_cut_by_themselves() -> None:
    """In a batch, prompts of other lengths that merge with their labels are scored as each alone is."""
    lens = lens_of(wrapped("byte-level", "{{ messages[0].content }}{% if not add_generation_prompt %}"
                                         "{{ messages[1].content }}{% endif %}"))  # fmt: skip
    texts = ["I am so ", "so ", "the movie was bad:"]
    examples = [al.Example(text, "happy", messages=({"role": "user", "content": text},)) for text in texts]
    together = ask(lens, examples, labels=LABELS)
    for row, example in enumerate(examples):
        alone = ask(lens, [example], labels=LABELS)
        mask = together.batch["attention_mask"][row].bool()
        assert together.batch["input_ids"][row][mask].tolist() == alone.batch["input_ids"][0].tolist()
        assert together.labels[row] == alone.labels[0]
    assert len(set(together.labels)) == 2
    task = al.Task("t", tuple(examples), labels=LABELS)
    scores = al.evaluate(lens, task).frame
    single = [al.evaluate(lens, al.Task("t", (one,), labels=LABELS)).frame["logp"][0] for one in examples]
    assert pytest.approx(single, abs=1e-4) == scores["logp"].tolist()


def test_strings_reach_templates_that_walk_through_parts_and_the_reverse() -> None:
    """A system turn and a user turn, in either form, give one prompt."""
    string = [{"role": "system", "content": "be good"}, {"role": "user", "content": TEXT}]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in string]
    for shape in ("walks through parts", "chatml"):
        lens = lens_of(wrapped("byte-level", TEMPLATES[shape]))
        ids = {
            tuple(lens.prepare(*examples_of(*chat)[:1])["input_ids"][0].tolist()) for chat in (string, parts)
        }
        assert len(ids) == 1
        assert TEXT in lens.tokenizer.decode(ids.pop())


def test_a_text_that_a_template_leaves_out_is_no_prompt() -> None:
    """A template that drops the user's text is refused; one that drops a system turn is told."""
    lens = lens_of(wrapped("byte-level", "Answer:"))
    with pytest.raises(LensError, match="leaves out the text of the user"):
        lens.prepare(al.Example("1", "happy", text=TEXT))
    lens = lens_of(wrapped("byte-level", TEMPLATES["vicuna"]))
    chat = examples_of({"role": "system", "content": "be good"}, {"role": "user", "content": TEXT})
    with pytest.warns(Remark, match="leaves out or changes texts in the role system"):
        lens.prepare(*chat)


def test_a_closing_answer_is_left_out() -> None:
    """The assistant's last turn would show the label; it is not shown, and a remark says so."""
    lens = lens_of(wrapped("byte-level", TEMPLATES["chatml"]))
    turns = {"role": "user", "content": TEXT}, {"role": "assistant", "content": "happy"}
    with pytest.warns(Remark, match="end with a turn of the assistant"):
        found = lens.prepare(*examples_of(*turns)[:1])

    assert lens.prepare(*examples_of(turns[0])[:1])["input_ids"].equal(found["input_ids"])
    between = examples_of(*turns, turns[0])[0]
    assert "assistant\nhappy" in lens.tokenizer.decode(lens.prepare(between)["input_ids"][0])


def test_a_prompt_inside_a_thought_is_refused_or_closed() -> None:
    """Labels behind <think> are refused; `cue` closes the thought; an option turns thinking on again."""
    opens = _CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    task = al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=LABELS)
    lens = lens_of(wrapped("byte-level", opens, "<think>", "</think>"))
    with pytest.raises(LensError, match=r"opens a thought with <think>.*cue="):
        al.evaluate(lens, task)
    lens.cue = "\n</think>\n\n"
    prepared = prepare_task(lens, task)
    assert lens.tokenizer.decode(prepared.batches[0]["input_ids"][0]).endswith("<think>\n\n</think>\n\n")
    assert [lens.tokenizer.decode(ids) for ids in prepared.labels] == list(LABELS)
    own = lens_of(wrapped("byte-level", TEMPLATES["an empty thought"]))
    assert "<think>" in own.tokenizer.decode(own.prepare(*task.examples)["input_ids"][0])
    own.template_options = {"enable_thinking": True}
    assert "<think>" not in own.tokenizer.decode(own.prepare(*task.examples)["input_ids"][0])
    own.template_options = {"thinks": True}
    with pytest.raises(LensError, match="reads no option 'thinks'"):
        own.prepare(*task.examples)


@pytest.mark.parametrize(
    ("begins", "closes"),
    [
        ("<think>\n", "\n</think>\n\n"),
        (
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
    ],
)
def test_the_cue_that_the_error_names_closes_the_thought(begins: str, closes: str) -> None:
    """Given to the lens, the labels are scored right behind it."""
    opens = _CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n" + begins + "{% endif %}"
    lens = lens_of(wrapped("byte-level", opens))
    task = al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=LABELS)

    with pytest.raises(LensError, match=re.escape(f"cue={closes!r}")):
        al.evaluate(lens, task)
    lens.cue = closes
    prepared = prepare_task(lens, task)
    assert lens.tokenizer.decode(prepared.batches[0]["input_ids"][0]).endswith(begins + closes)


def test_a_prompt_that_has_begun_to_write_a_thought_is_refused() -> None:
    """Words behind the tag don't end the thought; a tag in the user's text begins none."""
    opens = _CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\nOkay, {% endif %}"
    task = al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=LABELS)
    with pytest.raises(LensError, match="opens a thought with <think>"):
        prepare_task(lens_of(wrapped("byte-level", opens)), task)
    task = al.Task("t", examples_of({"role": "user", "content": "what is <think> for"}), labels=LABELS)
    prepare_task(lens_of(wrapped("byte-level", TEMPLATES["chatml"])), task)


def test_an_empty_thought_of_the_template_is_part_of_the_prompt() -> None:
    """Where past answers begin with an empty thought and the cue opens one, the label stands behind it."""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n"
    template = turns + "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    lens = lens_of(wrapped("byte-level", template, "<think>", "</think>"))
    prepared = prepare_task(lens, al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=LABELS))

    assert lens.tokenizer.decode(prepared.batches[0]["input_ids"][0]).endswith("<think>\n\n</think>\n\n")
    assert [lens.tokenizer.decode(ids) for ids in prepared.labels] == list(LABELS)


def test_the_date_of_a_prompt_is_fixed() -> None:
    """A template that asks for today's date gets one date, which the result states."""
    template = "{{ strftime_now('%d %b %Y') }} " + TEMPLATES["chatml"]
    lens = lens_of(wrapped("byte-level", template))
    task = al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=LABELS)
    prompts = al.evaluate(lens, task).origin["prompts"]

    assert prompts["first"].startswith("26 Jul 2024 ")
    assert prompts["date"] == DATE.isoformat()
    assert date.today().strftime("%Y") in lens.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )


def test_labels_that_share_all_tokens_are_refused() -> None:
    """A tokenizer that lower-cases can't tell two such labels apart, and the task says they are alike."""
    lens = lens_of(wrapped("wordpiece, begins and ends", TEMPLATES["chatml"]))
    with pytest.warns(Remark, match="'happy' and 'Happy' differ only in case"):
        task = al.Task("t", examples_of({"role": "user", "content": TEXT}), labels=("happy", "sad", "Happy"))
    with pytest.raises(TaskError, match="are the beginning of those"):
        al.evaluate(lens, task)
