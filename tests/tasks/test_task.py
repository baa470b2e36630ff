"""Tasks are read strictly: an example that can't be judged is an error, or dropped and counted."""

import json
from pathlib import Path

import pytest

import affectlens as al
from affectlens.errors import TaskError
from affectlens.tasks import read_answer

GOOD = {"id": 1, "text": "what a day", "label": "happy"}
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
    """Valence −1.5 is negative and 2 positive; 0 and NaN are dropped and counted."""
    lines = [{"id": i, "text": "x", "label": v} for i, v in enumerate((-1.5, 2, 0, float("nan")))]
    task = al.load_task("valence", write(tmp_path / "v.jsonl", *lines))

    assert ["negative", "positive"] == [example.label for example in task.examples]
    assert 2 == task.dropped


def test_bad_tasks_are_told(tmp_path: Path) -> None:
    """A missing file, an unknown kind, one label, repeated ids and unknown labels are errors."""
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


@pytest.mark.parametrize(("text", "label"), ANSWERS)
def test_answers_are_read_strictly(text: str, label: str | None) -> None:
    """An answer is one label, as a whole word and not negated."""
    assert label == read_answer(text, ("happy", "sad"))


@pytest.mark.parametrize(("text", "label"), NESTED)
def test_the_longest_label_is_the_one_named(text: str, label: str | None) -> None:
    """'very happy' is not read as 'happy'."""
    assert label == read_answer(text, ("happy", "very happy"))
