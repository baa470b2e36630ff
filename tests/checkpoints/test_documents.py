"""JSON from strangers has one meaning and a bounded size, or is an error that says what is wrong."""

from pathlib import Path

import pytest

from affectlens.checkpoints.documents import JSON_LIMIT, parse, read_json
from affectlens.errors import CheckpointError

# bytes → what the error says
BROKEN: tuple[tuple[bytes, str], ...] = (
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "not a JSON object"),
    (b'"x"', "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"\xff\xfe{\0}\0", "not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ('{"a": 1}'.encode("utf-32-le"), "not valid JSON"),
    ('{"a": 1}'.encode("utf-8-sig"), "BOM"),
    (b'{"a": "\xc3"}', "not UTF-8"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    (b'{"a":[' + b"0," * 2_000_001 + b"0]}", "more than 2,000,000 values"),
)


@pytest.mark.parametrize(("raw", "message"), BROKEN, ids=[raw[:12].hex() for raw, _ in BROKEN])
def test_what_is_no_json_object_is_refused(raw: bytes, message: str) -> None:
    """Other encodings and marks before the text are refused too, though Python's parser takes them."""
    with pytest.raises(CheckpointError, match=message):
        parse(raw, "config.json")


def test_keys_that_stand_twice_are_named() -> None:
    """Of repeated keys the last counts, as for most readers, and each is reported at any depth."""
    found = parse(b'{"a": 1, "b": {"c": 1, "c": 2}, "a": {"d": [{"e": 0, "e": 1}]}}', "config.json")

    assert {"a": {"d": [{"e": 1}]}, "b": {"c": 2}} == found.content
    assert ("c", "e", "a") == found.twice
    assert ("config.json has the key 'c' twice; the last one counts.",) == found.notes("config.json")
    with pytest.raises(CheckpointError, match="has the key 'c' twice"):
        found.strict("adapter_config.json")


def test_keys_that_stand_once_are_no_matter() -> None:
    """The same key in two objects is not a repeated key."""
    found = parse(b'{"a": {"x": 1}, "b": {"x": 1}}', "config.json")

    assert ((), ()) == (found.twice, found.notes("config.json"))
    assert found.content == found.strict("config.json")


def test_a_file_larger_than_a_config_is_not_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte is refused without reading it."""
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)

    with pytest.raises(CheckpointError, match=f"config.json: larger than {JSON_LIMIT:,} bytes"):
        read_json(file)
