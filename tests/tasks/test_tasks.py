"""Tasks are read strictly: what can't be judged is told or counted, never dropped in silence."""

import json
from pathlib import Path

import pytest
from PIL import Image

import affectlens as al
from affectlens.errors import TaskError
from affectlens.tasks import open_picture, read_answer

GOOD = {"id": 1, "text": "what a day", "label": "happy"}
BAD = (
    ("[1]", "an example must be a JSON object, got a list"),
    ('{"id": 1, "text": "x"}', "needs an id and a label. Fields here: id, text"),
    ('{"id": 1, "text": "x", "label": null}', "needs an id and a label"),
    ('{"id": 1, "label": "x"}', "needs text, messages, image, images, audio or video"),
    ('{"id": 1, "label": "x", "text": "x", "lable": 2}', "unknown fields lable"),
    ("{", "line 2: not valid JSON"),
    ('{"id": 1, "text": "x", "label": "x", "meta": "speaker"}', "meta must be an object, got a string"),
    ('{"id": 1, "images": "a.png", "label": "x"}', "images must be a list, got a string"),
    (
        '{"id": 1, "messages": [{"role": "user"}], "label": "x"}',
        "a message must be an object with role and content",
    ),
)
ANSWERS = (
    ("happy", "happy"),
    ("Happy.", "happy"),
    ("The person looks sad", "sad"),
    ("happy or sad", None),  # naming every label is no answer
    ("", None),
    ("unhappy", None),
    ("not happy", None),
    ("not at all happy", None),
    ("I don't think it is happy", None),
    ("not sure, but happy", "happy"),
    ("sadness", None),
    ("It is sad, so sad", "sad"),
)
NESTED = (("very happy", "very happy"), ("happy", "happy"), ("happy, very happy", None))


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def test_a_task_is_its_file(tmp_path: Path) -> None:
    """Labels, size and majority come from the examples."""
    sad = {"id": 2, "text": "rain", "label": "sad"}
    task = al.load_task("emotion-labels", write(tmp_path / "t.jsonl", GOOD, sad, {**sad, "id": 3}))

    assert ("t", ("happy", "sad"), 3) == (task.name, task.labels, len(task))
    assert pytest.approx(2 / 3) == task.majority
    assert "{text} Which emotion is this? Answer with one word of: happy, sad." == task.prompt


def test_numbers_become_signs_and_zeros_are_counted(tmp_path: Path) -> None:
    """Valence −1.5 is negative, 2 positive; 0 and NaN are dropped, and the task says how many were."""
    lines = [{"id": i, "text": "x", "label": v} for i, v in enumerate((-1.5, 2, 0, float("nan")))]
    task = al.load_task("valence", write(tmp_path / "v.jsonl", *lines))

    assert ["negative", "positive"] == [example.label for example in task.examples]
    assert 2 == task.dropped


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    """The error says which line and what it lacks."""
    with pytest.raises(TaskError, match=message):
        al.load_task("labels", write(tmp_path / "t.jsonl", GOOD, line))


def test_bad_tasks_are_told(tmp_path: Path) -> None:
    """No file, no such kind, one label, doubled ids, stray labels."""
    file = write(tmp_path / "t.jsonl", GOOD, {**GOOD, "label": "sad"})
    with pytest.raises(TaskError, match="no such file"):
        al.load_task("labels", tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="Did you mean 'valence'"):
        al.load_task("valense", file)
    with pytest.raises(TaskError, match="the id '1' is already used in line 1"):
        al.load_task("labels", file)
    with pytest.raises(TaskError, match="needs at least two labels, got"):
        al.load_task("labels", write(tmp_path / "one.jsonl", GOOD))
    with pytest.raises(TaskError, match=r"labels \['happy'\] of its examples are not among"):
        al.load_task("labels", write(tmp_path / "one.jsonl", GOOD), labels=("glad", "sad"))


def test_braces_in_a_text_are_data() -> None:
    """A text is put into the prompt as it is."""
    example = al.Example("1", "x", text="{labels} {0}")

    assert "say {labels} {0}" == example.chat("say {text}")[0]["content"][-1]["text"]


@pytest.mark.parametrize(("text", "label"), ANSWERS)
def test_answers_are_read_strictly(text: str, label: str | None) -> None:
    """One label as a word of its own, not negated; anything else is no answer."""
    assert label == read_answer(text, ("happy", "sad"))


@pytest.mark.parametrize(("text", "label"), NESTED)
def test_the_longest_label_is_the_one_named(text: str, label: str | None) -> None:
    """'very happy' is not also 'happy'."""
    assert label == read_answer(text, ("happy", "very happy"))


def test_pictures_are_cut_from_sheets(tmp_path: Path) -> None:
    """A media fragment names one picture of a sheet; outside it is an error."""
    sheet = Image.new("RGB", (20, 10), "white")
    sheet.putpixel((12, 3), (255, 0, 0))
    sheet.save(tmp_path / "sheet.png")

    assert (255, 0, 0) == open_picture(f"{tmp_path}/sheet.png#xywh=10,0,10,10").getpixel((2, 3))
    for source, message in (
        (f"{tmp_path}/sheet.png#xywh=15,0,10,10", "not inside its sheet of 20 × 10 pixels"),
        (f"{tmp_path}/none.png", "no such picture"),
        (str(write(tmp_path / "text.png", "no picture")), "can't be read"),
    ):
        with pytest.raises(TaskError, match=message):
            open_picture(source)


def test_null_is_absent(tmp_path: Path) -> None:
    """As pandas writes fields that are not there; the word 'None' reaches no prompt."""
    line = {"id": 1, "text": None, "image": "a.png", "messages": None, "meta": None, "label": "happy"}
    (example, _) = al.load_task(
        "labels", write(tmp_path / "t.jsonl", line, {**GOOD, "id": 2, "label": "sad"})
    ).examples

    assert ("", (str(tmp_path / "a.png"),), {}) == (example.text, example.images, dict(example.meta))


def test_text_of_other_encodings_is_told(tmp_path: Path) -> None:
    """A byte order mark is skipped; what is not UTF-8 is an error of ours."""
    file = write(tmp_path / "t.jsonl", GOOD, {**GOOD, "id": 2, "label": "sad"})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert 2 == len(al.load_task("labels", file))

    file.write_bytes(b'{"id": 1, "label": "x", "text": "caf\xe9"}')
    with pytest.raises(TaskError, match="not UTF-8 text"):
        al.load_task("labels", file)
