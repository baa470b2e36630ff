"""Base and tuned are asked with one template, base's or tuned's, and results say which."""

import copy
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

import affectlens as al
from affectlens.checkpoints.chat_templates import ChatTemplate, chat_template
from affectlens.effects.prompting import asked_as
from affectlens.errors import LensError, Remark

OTHER = "{% for m in messages %}{{ m.role }} {{ m.content[-1].text }}{% endfor %}"
OTHER += "{% if add_generation_prompt %} :{% endif %}"


@pytest.fixture
def tuned(demo: al.Demo, tmp_path: Path) -> Path:
    """The demo's tuned model with a chat template of its own."""
    folder = Path(shutil.copytree(demo.tuned.store.source, tmp_path / "tuned"))
    (folder / "chat_template.jinja").write_text(OTHER)
    return folder


def test_a_sweep_asks_as_base_or_as_tuned(lens: al.Lens, demo: al.Demo, tuned: Path) -> None:
    """The first prompt in the result is that of the template asked for; base and tuned get the same one."""
    task, gates = demo.task("sentences").head(6), demo.base.sites.where(tower="language", role="gate_proj")
    grid = al.Grid(gates, donor=tuned, n_random=0)
    lens.told.clear()
    with pytest.warns(Remark, match="chat templates of base and tuned differ"):
        own = al.sweep(lens, grid, task, progress=False)
    other = al.sweep(lens, grid, task, prompt_of="tuned", progress=False)
    prompts = [one.origin["prompts"]["sentences"] for one in (own, other)]

    assert ["base", "tuned"] == [one.origin["prompt_of"] for one in (own, other)]
    assert not prompts[0]["first"].startswith("user")
    assert prompts[1]["first"].startswith("user ")
    assert prompts[0]["template"] != prompts[1]["template"]
    assert any("chat templates of base and tuned differ" in words for words in own.origin["findings"])
    alone = al.evaluate(lens, task, prompt_of=tuned).metric("margin").value
    rows = other.frame.query("sites == 'all' and metric == 'margin'")
    assert pytest.approx(alone) == float(rows["baseline"].iloc[0])
    spread = al.sweep(lens, grid, task, prompt_of="tuned", executor=ThreadPoolExecutor(1), progress=False)
    assert spread.frame.equals(other.frame)


def test_workers_ask_as_this_process_does(demo: al.Demo) -> None:
    """What was set on the lens reaches a process that loads the base again, or the sweep is refused."""
    task, gates = demo.task("sentences").head(6), demo.base.sites.where(tower="language", role="gate_proj")
    grid = al.Grid(gates, donor=demo.tuned, n_random=0)
    lens = al.load(demo.base, dtype="float32", cue=" so")
    here = al.sweep(lens, grid, task, progress=False).frame

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = al.sweep(lens, grid, task, executor=pool, progress=False).frame
        plain = al.sweep(al.load(demo.base, dtype="float32"), grid, task, executor=pool, progress=False).frame
    assert there.equals(here)
    assert not plain.equals(here)
    lens.template = ChatTemplate(OTHER, tokenizers=False)
    other = al.sweep(lens, grid, task, progress=False).frame
    assert al.sweep(lens, grid, task, executor=ThreadPoolExecutor(1), progress=False).frame.equals(other)
    lens.processor = copy.deepcopy(lens.processor)
    lens.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["user "]})
    with pytest.raises(LensError, match="gets other prompts than this lens has"):
        al.sweep(lens, grid, task, executor=ThreadPoolExecutor(1), progress=False)


def test_what_prompts_of_a_model_can_be_given(lens: al.Lens, demo: al.Demo, tuned: Path) -> None:
    """`evaluate` takes a path or a lens; words that name nothing are refused with what is known."""
    task = demo.task("sentences").head(6)
    by_path = al.evaluate(lens, task, prompt_of=tuned).frame
    by_lens = al.evaluate(lens, task, prompt_of=al.load(tuned, dtype="float32")).frame

    assert by_path.equals(by_lens)
    assert not by_path.equals(al.evaluate(lens, task).frame)
    with pytest.raises(LensError, match="needs a tuned model"):
        al.evaluate(lens, task, prompt_of="tuned")
    with pytest.raises(LensError, match="unknown prompt_of='tunde'"):
        al.evaluate(lens, task, prompt_of="tunde")
    (tuned / "chat_template.jinja").unlink()
    with pytest.raises(LensError, match="no chat template of its own"):
        al.evaluate(lens, task, prompt_of=tuned)


def test_one_template_asks_in_one_way(lens: al.Lens, demo: al.Demo, tuned: Path) -> None:
    """A tuned folder that has base's template, but no files of a processor, asks as base does."""
    own = lens.prompt_format.used
    assert own is not None
    (tuned / "chat_template.jinja").write_text(str(own.text))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tuned / name).unlink(missing_ok=True)
    asked = asked_as(lens, tuned)

    assert asked.prompt_format.used == own


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("chat_template.jinja", "a", ChatTemplate("a", tokenizers=True)),
        ("chat_template.json", '{"chat_template": "a"}', ChatTemplate("a", tokenizers=False)),
        ("tokenizer_config.json", '{"chat_template": "a"}', ChatTemplate("a", tokenizers=True)),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default", "template": "a"}]}',
            ChatTemplate({"default": "a"}, tokenizers=True),
        ),
        ("tokenizer_config.json", "{}", None),
    ],
)
def test_where_templates_are_stored(
    file: str, content: str, expected: ChatTemplate | None, tmp_path: Path
) -> None:
    """Every file that transformers reads a template from is read."""
    (tmp_path / file).write_text(content)

    assert expected == chat_template({file: tmp_path / file})
