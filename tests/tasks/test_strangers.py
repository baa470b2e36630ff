"""Tasks and pictures from strangers: an example, or an error that names the line; nothing hangs."""

import json
import os
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

import affectlens as al
from affectlens.errors import TaskError
from affectlens.tasks import example_files, open_picture

GOOD = {"id": 1, "text": "what a day", "label": "happy"}
OTHER = {"id": 2, "text": "rain", "label": "sad"}

# a second line → what is said of it
LINES = (
    ('{"id": 2, "label": "x", "text": "a", "text": "b"}', "a field appears twice in one object"),
    ('{"id": 2, "label": "x", "text": "\\ud800"}', "half of a character"),
    ('{"id": 2, "label": "\\uDFFF", "text": "x"}', "half of a character"),
    ('{"id": 2, "label": "x", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ('{"id": 2, "label": "x", "meta": {"a": ' + "9" * 5000 + "}}", "not valid JSON"),
    ('{"id": 2, "label": ["x"], "text": "x"}', "label must be a string or a number, got a list"),
    ('{"id": {}, "label": "x", "text": "x"}', "id must be a string or a number, got an object"),
    (
        '{"id": 2, "label": "x", "images": [3]}',
        "a file of type image must be named by a string, got a number",
    ),
    (
        '{"id": 2, "label": "x", "images": [["a.png"]]}',
        "a file of type image must be named by a string, got a list",
    ),
    (
        '{"id": 2, "label": "x", "text": "x", "meta": {"cluster": []}}',
        "meta.cluster must be a string or a number, got a list",
    ),
    ('{"id": 2, "label": "x", "messages": [{"content": "x"}]}', "must be an object with role and content"),
    ('{"id": 2, "label": "x", "messages": [{"role": 1, "content": "x"}]}', "an object with role and content"),
    (
        '{"id": 2, "label": "x", "messages": [{"role": "user", "content": 7}]}',
        "must be a string or a list of objects",
    ),
    (
        '{"id": 2, "label": "x", "messages": [{"role": "user", "content": ["x"]}]}',
        "must be a string or a list of objects",
    ),
    (
        '{"id": 2, "label": "x", "messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        "a part of type text needs a text",
    ),
    (
        '{"id": 2, "label": "x", "messages": [{"role": "user", "content": [{"type": "smell"}]}]}',
        "a part of type 'smell'. Types: text, image, audio, video",
    ),
    (
        '{"id": 2, "label": "x", "messages": [{"role": "user", "content": [{"type": "\\u001b[31m"}]}]}',
        r"a part of type '.*\[31m'. Types: text, image, audio, video",
    ),
    ('{"id": 2, "label": "x", "\\u001b[31m": 1, "text": "x"}', r"unknown fields '.*\[31m'"),
    ('{"id": 1, "label": "x", "text": "x"}', "the id '1' is already used in line 1"),
    ("null", "an example must be a JSON object, got null"),
    ("NaN", "an example must be a JSON object, got a number"),
    ('{"id": 2, "label": "x", "text": "' + "a" * 1_000_001 + '"}', "a text of 1,000,001 characters"),
    (json.dumps({"id": 2, "label": "x", "images": ["a.png"] * 1001}), "1,001 files of type image"),
    (json.dumps({"id": 2, "label": "x", "audio": ["a.wav"] * 101}), "101 files of type audio"),
    ('{"id": 2, "label": "x", "audio": {"a": 1}}', "audio must be a string or a list, got an object"),
    (
        '{"id": 2, "label": "x", "audio": [["a.wav"]]}',
        "a file of type audio must be named by a string, got a list",
    ),
    (
        '{"id": 2, "label": "x", "video": [1, 2]}',
        "a file of type video must be named by a string, got a number",
    ),
)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def png(path: Path, width: int, height: int) -> Path:
    """Write a small file whose header states a large picture."""
    chunks = b""
    for name, data in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize(("line", "message"), LINES, ids=[message for _, message in LINES])
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    """The error names the file and the line, on one printable line."""
    with pytest.raises(TaskError, match=message) as caught:
        al.load_task("labels", write(tmp_path / "t.jsonl", GOOD, line))

    assert str(caught.value).startswith("t.jsonl, line 2: ")
    assert str(caught.value).isprintable()


def test_what_is_no_file_does_not_block(tmp_path: Path) -> None:
    """Pipes, devices, folders and impossible names are refused before they are opened."""
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "not an ordinary file"),
        (Path("/dev/zero"), "not an ordinary file"),
        (tmp_path, "not an ordinary file"),
        (tmp_path / "none", "no such file of examples"),
        (tmp_path / ("x" * 300), "can't be read .File name too long"),
        (Path("nul\0"), "no such file of examples"),
    ):
        with pytest.raises(TaskError, match=message):
            al.load_task("labels", path)


def test_a_line_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line or file above the limit is not read to its end."""
    file = write(tmp_path / "t.jsonl", GOOD, " " * 2000)
    monkeypatch.setattr(example_files, "_LINE", 1000)
    with pytest.raises(TaskError, match="line 2: longer than 1,000 bytes"):
        al.load_task("labels", file)
    monkeypatch.setattr(example_files, "_FILE", 1500)
    with pytest.raises(TaskError, match="larger than 1,500 bytes"):
        al.load_task("labels", file)


def test_other_ends_of_line_are_text(tmp_path: Path) -> None:
    """A Unicode line separator inside a text does not end the JSON line."""
    text = "one\u2028two\x85three\x0cfour"
    file = tmp_path / "t.jsonl"
    lines = [{**GOOD, "text": text}, OTHER]
    file.write_text("\r\n".join(json.dumps(x, ensure_ascii=False) for x in lines), "utf-8", newline="")

    assert text == al.load_task("labels", file).examples[0].text


def test_labels_that_are_not_there_are_counted(tmp_path: Path) -> None:
    """NaN, as pandas writes a missing label, and the empty string are dropped and counted."""
    lines = [{**GOOD, "id": n, "label": label} for n, label in enumerate(("a", "b", float("nan"), "", "nan"))]
    task = al.load_task("labels", write(tmp_path / "t.jsonl", *lines))

    assert (("a", "b", "nan"), 2) == (task.labels, task.dropped)


def test_pictures_may_lie_where_the_task_says(tmp_path: Path) -> None:
    """A task may name pictures by any path; the error of another kind of file shows none of its content."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "secret.png").write_text("password")
    (tmp_path / "task").mkdir()
    lines = [
        {"id": n, "image": x, "label": str(n)}
        for n, x in enumerate(("../red.png", str(tmp_path / "red.png")))
    ]
    task = al.load_task("labels", write(tmp_path / "task" / "t.jsonl", *lines))

    assert [(255, 0, 0)] * 2 == [open_picture(one.images[0]).getpixel((0, 0)) for one in task.examples]
    with pytest.raises(TaskError, match="this picture can't be read") as caught:
        open_picture(str(tmp_path / "task" / ".." / "secret.png"))
    assert "password" not in str(caught.value)


def test_pictures_that_are_none(tmp_path: Path) -> None:
    """Pipes, devices, URLs, decompression bombs, programs and broken files are errors, at once."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    began = time.monotonic()
    for source, message in (
        (tmp_path / "pipe.png", "not an ordinary file"),
        ("/dev/zero", "not an ordinary file"),
        (tmp_path, "not an ordinary file"),
        ("https://example.org/x.png", "no such picture"),
        ("nul\0.png", "no such picture"),
        ("x" * 5000, "no such picture"),
        (png(tmp_path / "bomb.png", 60_000, 60_000), "more than 89,478,485 pixels"),
        (png(tmp_path / "bomb.png", 10_000, 10_000), "more than 89,478,485 pixels"),
        (tmp_path / "program.eps", "can't be read"),
        (tmp_path / "cut.png", "can't be read"),
        (f"{tmp_path}/cut.png#xywh={'9' * 5000},0,1,1", "no such picture"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            open_picture(str(source))
        assert str(caught.value).isprintable()
    assert 5 > time.monotonic() - began
