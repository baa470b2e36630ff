"""A printed name is one line of visible characters, and keeps both of its ends."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectlens.html import escape
from affectlens.printable import plain, seen, sentence
from tests.evil_names import EVIL

BOUNDED = settings(max_examples=300, derandomize=True, deadline=None, database=None)
ANY = st.text(st.characters(exclude_categories=[]))  # halves of surrogate pairs too


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.gate_proj.weight", "model.layers.0.gate_proj.weight"),
        ("a\x1b[31mb", "a�[31mb"),
        ("gate\nforged", "gate�forged"),
        ("a\u2028b\u2029c\x85d", "a�b�c�d"),
        ("\u202egnp.exe", "�gnp.exe"),
        ("a\u200bb\u00adc\ufeff", "a�b�c�"),
        ("\U000e0067", "�"),
        ("\u3164\u115f\u2800\ufe01", "����"),
        ("\ud800", "�"),
        ("\ue000", "�"),
        ("e\u0301" + "\u0301" * 9, "e\u0301\u0301\u0301"),
        ("tiếng Việt 表 สวัสดี नमस्ते مرحبا", "tiếng Việt 表 สวัสดี नमस्ते مرحبا"),
        ("❤️ 👩‍💻 👍🏽 🇩🇪", "❤️ 👩‍💻 👍🏽 🇩🇪"),
        ("a\u200db\ufe0f", "a�b�"),
        ("50\xa0%", "50\xa0%"),
    ],
)
def test_what_can_not_be_seen_is_marked(name: str, expected: str) -> None:
    """Controls, bidi, zero width, tags, fillers, half pairs and many accents are; words and emoji are not."""
    assert expected == plain(name)


@BOUNDED
@given(ANY | st.sampled_from(EVIL))
def test_a_name_is_one_short_line_in_any_encoding(name: str) -> None:
    """Every character is visible, except joiners of an emoji; a second pass changes nothing."""
    found = plain(name)

    assert 200 >= len(found)
    assert 1 >= len(found.splitlines())
    assert found == plain(found)
    found.encode("utf-8")
    for char in found:
        assert char.isprintable() or unicodedata.category(char) == "Zs" or char == "\u200d"


@BOUNDED
@given(ANY)
def test_a_sentence_is_one_line(words: str) -> None:
    """Line breaks of every kind become blanks."""
    found = sentence(words)

    assert 1 >= len(found.splitlines())
    assert seen(found) == found


def test_both_ends_of_a_name_stay() -> None:
    """They tell the model and the layer, and the matrix."""
    found = plain("model.layers.11." + "x" * 100_000 + ".gate_proj.weight")

    assert 200 == len(found)
    assert found.startswith("model.layers.11.x")
    assert found.endswith("x.gate_proj.weight")
    assert "a…b" == plain("a" + "x" * 100 + "b", 3)


def test_a_reason_stays_however_long_the_name() -> None:
    """Long words are cut, not the sentence; a sentence of many words loses its middle."""
    for name in ("x" * 100_000, "many " * 20_000):
        found = sentence(f"/models/{name}/model.safetensors: tensor 'w': overlaps another")
        assert found.startswith("/models/")
        assert found.endswith("tensor 'w': overlaps another")
        assert 2000 >= len(found)


def test_a_name_of_ten_million_characters_takes_no_time() -> None:
    """Characters that are left out are not examined."""
    began = time.process_time()
    plain("é" * 10_000_000)

    assert 0.5 > time.process_time() - began


def test_quotes_are_escaped_for_attributes() -> None:
    """Both kinds of quotes are escaped, once."""
    assert "&quot;&#x27;&amp;lt;" == escape("\"'&lt;")
