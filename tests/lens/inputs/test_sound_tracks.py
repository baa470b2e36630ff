"""Sound tracks of films: heard by models that take sounds, and told of where a model takes none."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

import affectlens as al
from affectlens.errors import MissingExtra, Remark
from affectlens.lens.inputs.placeholders import spans
from affectlens.lens.live import config_of
from tests import clips
from tests.lens.families import base
from tests.lens.processors import processor
from tests.tasks.test_sounds import tone

FILM, SOUND = {"type": "video"}, {"type": "audio"}


@pytest.fixture
def films(tmp_path: Path) -> tuple[str, str]:
    """A film with a sound track, and the same without."""
    pytest.importorskip("av", reason="av reads and writes films")
    return str(clips.film(tmp_path / "a.mp4")), str(clips.film(tmp_path / "b.mp4", sound=False))


def lens_of(family: str) -> al.Lens:
    return al.Lens(base(family), processor(family))


def test_a_model_that_hears_gets_the_sound_track(films: tuple[str, str], tmp_path: Path) -> None:
    """The batch is that of the silent film with the track given as a sound, and the logits move."""
    lens, (film, silent) = lens_of("qwen2_5_omni"), films
    batch = lens.prepare(al.Example("1", "x", "hm", video=(film,)))
    expected = lens.prepare(al.Example("1", "x", "hm", video=(silent,), audio=(film,)))

    assert expected.keys() == batch.keys()
    assert all(torch.equal(expected[name], batch[name]) for name in batch)
    places = spans(batch["input_ids"], batch["attention_mask"], config=config_of(lens.model))
    assert places["audio"].any()
    assert places["video"].any()
    unheard = lens.prepare(al.Example("1", "x", "hm", video=(silent,)))
    assert not spans(unheard["input_ids"], config=config_of(lens.model))["audio"].any()


def test_in_a_chat_a_sound_track_is_behind_its_film(films: tuple[str, str], tmp_path: Path) -> None:
    """Sounds and films keep the order of the chat's parts."""
    lens, (film, silent) = lens_of("qwen2_5_omni"), films
    own = str(tone(tmp_path / "own.wav", rate=8_000))
    words = {"type": "text", "text": "hm"}

    def asked(
        *parts: dict[str, str], audio: tuple[str, ...], video: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        chat = ({"role": "system", "content": "be kind"}, {"role": "user", "content": [*parts, words]})
        return lens.prepare(al.Example("1", "x", messages=chat, audio=audio, video=video))

    found = asked(SOUND, FILM, FILM, SOUND, audio=(own, own), video=(film, silent))
    expected = asked(SOUND, FILM, SOUND, FILM, SOUND, audio=(own, film, own), video=(silent, silent))

    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_a_model_that_does_not_hear_is_told_of(films: tuple[str, str], tmp_path: Path) -> None:
    """One remark for a lens says what is left out; films without sound get none."""
    lens, (film, silent) = lens_of("qwen2_vl"), films
    examples = [al.Example(str(n), "x", "hm", video=(one,)) for n, one in enumerate((film, silent))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = lens.prepare(examples[1])
        assert not caught
        found = lens.prepare(examples[0])
        lens.prepare(*examples)

    assert [
        "films here have a sound track, but Qwen2VLProcessor takes no sounds: the model gets pictures alone"
    ] == [str(one.message) for one in caught if issubclass(one.category, Remark)]
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_films_without_av_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra and what works without it."""
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    with pytest.raises(
        MissingExtra, match=r"needs av: pip install 'affectlens\[media\]', or give its frames"
    ):
        lens_of("qwen2_vl").prepare(al.Example("1", "x", "hm", video=(str(tmp_path / "a.mp4"),)))
