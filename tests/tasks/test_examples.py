"""Examples: a JSON line each, read strictly; an error names the line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import affectlens as al
from affectlens.errors import TaskError
from affectlens.tasks import open_picture

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


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    """The error says which line and what it lacks."""
    with pytest.raises(TaskError, match=message):
        al.load_task("labels", write(tmp_path / "t.jsonl", GOOD, line))


def test_braces_in_a_text_are_data() -> None:
    """Braces in a text are not filled in."""
    example = al.Example("1", "x", text="{labels} {0}")

    assert "say {labels} {0}" == example.chat("say {text}")[0]["content"][-1]["text"]


def test_null_is_absent(tmp_path: Path) -> None:
    """A null field, as pandas writes a missing one, counts as absent; no prompt contains 'None'."""
    line = {"id": 1, "text": None, "image": "a.png", "messages": None, "meta": None, "label": "happy"}
    (example, _) = al.load_task(
        "labels", write(tmp_path / "t.jsonl", line, {**GOOD, "id": 2, "label": "sad"})
    ).examples

    assert ("", (str(tmp_path / "a.png"),), {}) == (example.text, example.images, dict(example.meta))


def test_text_of_other_encodings_is_told(tmp_path: Path) -> None:
    """A byte order mark is skipped; other encodings than UTF-8 are a `TaskError`."""
    file = write(tmp_path / "t.jsonl", GOOD, {**GOOD, "id": 2, "label": "sad"})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert 2 == len(al.load_task("labels", file))

    file.write_bytes(b'{"id": 1, "label": "x", "text": "caf\xe9"}')
    with pytest.raises(TaskError, match="not UTF-8 text"):
        al.load_task("labels", file)


def test_examples_name_their_media(tmp_path: Path) -> None:
    """Paths are relative to the task's file; a list of frames is one film."""
    lines = [
        {"id": 1, "label": "a", "audio": "x.wav", "video": "film"},
        {"id": 2, "label": "b", "audio": ["x.wav", "y.wav"], "video": ["1.png", "2.png"], "text": "hm"},
        {"id": 3, "label": "b", "video": [], "image": "a.png"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, two, three = al.load_task("labels", tmp_path / "t.jsonl").examples

    x, y, film = (str(tmp_path / name) for name in ("x.wav", "y.wav", "film"))
    assert ((x,), (film,)) == (one.audio, one.video)
    assert (x, y) == two.audio
    assert ((str(tmp_path / "1.png"), str(tmp_path / "2.png")),) == two.video
    assert {"image": 1, "audio": 0, "video": 0} == three.media
    assert ["audio", "audio", "video", "text"] == [part["type"] for part in two.chat()[0]["content"]]


def test_media_are_given_as_people_have_them(tmp_path: Path) -> None:
    """One file or several, as a string, a path or a list; a picture also in memory."""
    picture = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    example = al.Example(
        "1",
        "x",
        images=[picture, tmp_path / "b.png"],
        image="c.png",
        audio="a.wav",
        video=[["1.png", "2.png"]],
    )

    assert example.images == (picture, str(tmp_path / "b.png"), "c.png")
    assert (example.audio, example.video) == (("a.wav",), (("1.png", "2.png"),))
    assert dict(example.media) == {"image": 3, "audio": 1, "video": 1}
    assert replace(example, label="y").images == example.images
    assert open_picture(picture).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(TaskError, match=r"one of images must be a file or a PIL\.Image, got a int"):
        al.Example("1", "x", images=[3])
    with pytest.raises(TaskError, match="one of audio must be a file, got a Image"):
        al.Example("1", "x", audio=picture)


def test_tables_and_arrays_are_tasks_too(tmp_path: Path) -> None:
    """The same examples from JSON lines, a JSON array, a CSV and a TSV; a table without ids is numbered."""
    rows = [
        {"id": "1", "text": 'so, "sad"', "label": "sad", "image": "a.png"},
        {"id": "2", "text": "yes\nyes", "label": "happy"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.drop(columns="id").to_csv(tmp_path / "t.tsv", index=False, sep="\t", encoding="utf-8-sig")
    expected = al.load_task("labels", tmp_path / "t.jsonl").examples

    for name in ("t.json", "lines.json", "t.csv", "t.tsv"):
        assert al.load_task("labels", tmp_path / name).examples == expected, name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "t.csv",
            "text,label\na,b\nc\n",
            "t.csv, line 3: the header has 2 columns, the row has another number",
        ),
        (
            "t.csv",
            "text,label\na,b,c\n",
            "t.csv, line 2: the header has 2 columns, the row has another number",
        ),
        ("t.csv", "text,mood\na,b\n", "t.csv, line 2: an example needs an id and a label"),
        ("t.csv", "id,text,label\n1,a,b\n1,c,d\n", "t.csv, line 3: the id '1' is already used in line 2"),
        ("t.csv", 'text,label\n"a,b\n', "t.csv, line 2: not a table of text"),
        ("t.json", '[{"id": 1}]', "t.json, entry 1: an example needs an id and a label"),
        ("t.json", '[{"id": 1,', "t.json: not valid JSON"),
        ("t.csv", b"text,label\n\xff,b\n", "t.csv: not UTF-8 text"),
    ],
)
def test_errors_name_the_line_or_the_entry(
    name: str, content: str | bytes, expected: str, tmp_path: Path
) -> None:
    """Of tables and arrays, as of JSON lines."""
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TaskError, match=re.escape(expected)):
        al.load_task("labels", tmp_path / name)
