"""Sounds and films: read as they are, brought to what a model takes, and refused where they are none."""

import json
import os
import struct
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

import affectlens as al
from affectlens.errors import MissingExtra, TaskError
from affectlens.tasks import films, open_film, open_sound

COLOURS = ("red", "green", "blue", "white", "black")


def tone(path: Path, *, rate: int = 16_000, hertz: float = 440.0, seconds: float = 0.5, dtype: str = "int16",
         channels: int = 1) -> Path:  # fmt: skip
    """A sine at half the largest value, as a WAV file."""
    values = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    kind = np.dtype(dtype)
    if kind.kind == "i":
        values = values * -float(np.iinfo(kind).min)
    if kind.kind == "u":
        values = values * 128 + 128
    wavfile.write(path, rate, np.repeat(values.astype(kind)[:, None], channels, axis=1).squeeze())
    return path


def colours(folder: Path, count: int, *, size: tuple[int, int] = (4, 4)) -> list[str]:
    """Frames numbered from 0, each of one grey of its own."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"f{n}.png" for n in range(count)]
    for n, file in enumerate(files):
        Image.new("RGB", size, (n, n, n)).save(file)
    return [str(file) for file in files]


def greys(film: films.Film) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in film.frames]  # type: ignore[index]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_sounds_are_parts_of_the_largest_value(dtype: str, tmp_path: Path) -> None:
    """However a sample is stored, half of the largest value is 0.5."""
    sound = open_sound(str(tone(tmp_path / "a.wav", dtype=dtype)), 16_000)

    assert (np.float32, 8000) == (sound.dtype, len(sound))
    assert pytest.approx(0.5, abs=0.01) == sound.max()
    assert pytest.approx(-0.5, abs=0.01) == sound.min()


def test_24_bits_are_read(tmp_path: Path) -> None:
    """Three bytes a sample, as recorders write them."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(3)
        stream.setframerate(16_000)
        stream.writeframes(b"\x00\x00\x40" * 100)  # 0x400000, half of 2^23

    assert pytest.approx(0.5) == open_sound(str(tmp_path / "a.wav"), 16_000).max()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_sounds_are_resampled(rate: int, tmp_path: Path) -> None:
    """A tone recorded at another rate is the same tone at the model's."""
    same = open_sound(str(tone(tmp_path / "a.wav")), 16_000)
    other = open_sound(str(tone(tmp_path / "b.wav", rate=rate)), 16_000)

    assert len(same) == len(other)
    inner = slice(1000, -1000)  # a filter rings where a sound begins and ends
    np.testing.assert_allclose(same[inner], other[inner], atol=0.01)


def test_channels_are_averaged(tmp_path: Path) -> None:
    """What is on one of two channels alone is half as loud."""
    left = np.zeros((1000, 2), np.float32)
    left[:, 0] = 0.8
    wavfile.write(tmp_path / "a.wav", 16_000, left)

    np.testing.assert_allclose(0.4, open_sound(str(tmp_path / "a.wav"), 16_000))


def test_sounds_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes, devices, addresses, broken, empty and lying files are errors that name them, at once."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    os.mkfifo(tmp_path / "pipe.wav")
    good = tone(tmp_path / "good.wav").read_bytes()
    files = {
        "cut": good[:30],
        "empty": good[:40] + struct.pack("<I", 0),
        "format": good[:20] + b"\x99\x99" + good[22:],
        "channels": good[:22] + b"\0\0" + good[24:],
        "wide": good[:40] + struct.pack("<I", 2**32 - 1) + good[44:60],
        "huge": b"RF64\xff\xff\xff\xffWAVEds64"
        + struct.pack("<IQQQI", 28, 2**63, 2**63, 2**60, 0)
        + good[12:],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
    for name, rate in (("slow", 1), ("fast", 2**30)):
        wavfile.write(tmp_path / f"{name}.wav", rate, np.zeros(100, np.int16))
    wavfile.write(tmp_path / "nan.wav", 16_000, np.array([0, np.nan], np.float32))
    began = time.monotonic()
    for source, message in (
        ("pipe.wav", "not an ordinary file"),
        ("/dev/zero", "not an ordinary file"),
        (".", "not an ordinary file"),
        ("https://example.org/x.wav", "no such sound"),
        ("nul\0.wav", "no such sound"),
        ("cut.wav", "this sound"),
        ("empty.wav", "this sound"),
        ("format.wav", "can't be read"),
        ("channels.wav", "can't be read"),
        ("slow.wav", r"unsupported sample rate 1 Hz \(1,000–384,000\)"),
        ("fast.wav", "unsupported sample rate 1,073,741,824 Hz"),
        ("nan.wav", "samples that are NaN or infinite"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            open_sound(str(tmp_path / source), 16_000)
        assert str(caught.value).isprintable()
    for source in ("wide.wav", "huge.wav"):  # a size that lies is no more than the file
        try:
            assert 100 > len(open_sound(str(tmp_path / source), 16_000))
        except TaskError as error:
            assert "this sound" in str(error)  # noqa: PT017  either will do
    assert 5 > time.monotonic() - began


def test_other_sounds_take_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no WAV file names the extra that reads it."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.mp3").write_bytes(b"ID3\x03" + bytes(100))
    with pytest.raises(MissingExtra, match=r"need soundfile: pip install 'affectlens\[media\]'"):
        open_sound(str(tmp_path / "a.mp3"), 16_000)


def test_films_are_folders_lists_and_animations(tmp_path: Path) -> None:
    """However its frames are given, a film is the same; an animation has a clock."""
    files = colours(tmp_path / "film", 12)
    pictures = [Image.open(file) for file in files]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)
    pictures[0].save(
        tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=100, lossless=True
    )

    expected = list(range(12))
    assert expected == greys(open_film(files))
    assert expected == greys(open_film(str(tmp_path / "film")))  # f2 comes before f10
    assert None is open_film(files).fps
    for name in ("a.png", "a.webp"):
        film = open_film(str(tmp_path / name))
        assert expected == greys(film)
        assert pytest.approx(10.0) == film.fps


def test_a_gif_is_a_film(tmp_path: Path) -> None:
    """Also a still picture is one, of one frame."""
    pictures = [Image.new("RGB", (4, 4), colour) for colour in COLOURS]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=500)
    pictures[0].save(tmp_path / "still.gif")

    film = open_film(str(tmp_path / "a.gif"))
    assert [(255, 0, 0), (0, 128, 0), (0, 0, 255)] == [f.getpixel((0, 0)) for f in film.frames[:3]]
    assert (5, 2.0) == (len(film.frames), film.fps)
    assert 1 == len(open_film(str(tmp_path / "still.gif")).frames)


def test_frames_are_taken_at_even_distances(tmp_path: Path) -> None:
    """The first and the last are among them, and an animation's clock goes by those that are taken."""
    files = colours(tmp_path / "film", 31)
    pictures = [Image.open(file) for file in files]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)

    assert [0, 10, 20, 30] == greys(open_film(files, 4))
    film = open_film(str(tmp_path / "a.png"), 4)
    assert ([0, 10, 20, 30], pytest.approx(4 / 3.1)) == (greys(film), film.fps)
    assert films.FRAMES == len(open_film(colours(tmp_path / "long", films.FRAMES + 9)).frames)


def test_films_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, frames of two sizes, links out of a folder, and broken files are errors that name them."""
    monkeypatch.setitem(sys.modules, "av", None)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "none").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "own.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(tmp_path / "own.png")
    (tmp_path / "text.gif").write_text("#EXTM3U\nfile:///etc/passwd\n")
    two = [*colours(tmp_path / "two", 1), *colours(tmp_path / "sizes", 1, size=(5, 4))]
    began = time.monotonic()
    for source, message in (
        (str(tmp_path / "pipe"), "not an ordinary file"),
        ("/dev/zero", "not an ordinary file"),
        ("https://example.org/x.mp4", "no such film"),
        (str(tmp_path / "none"), "has no frames"),
        ((), "has no frames"),
        (str(tmp_path / "linked"), "a link out of the folder"),
        (str(tmp_path / "text.gif"), "this film can't be read"),
        (two, "must have one size, got 4 × 4, 5 × 4"),
        ([*two[:1], "missing.png"], "no such picture"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            open_film(source)
        assert str(caught.value).isprintable()
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    with pytest.raises(
        MissingExtra, match=r"needs av: pip install 'affectlens\[media\]', or give its frames"
    ):
        open_film(str(tmp_path / "a.mp4"))
    assert 5 > time.monotonic() - began


def test_examples_name_their_media(tmp_path: Path) -> None:
    """Paths go from the file of the task; a list of frames is one film."""
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


def test_media_are_tuples() -> None:
    """One text would be taken apart into letters."""
    example = al.Example("1", "x")
    object.__setattr__(example, "audio", "a.wav")
    with pytest.raises(TaskError, match="audio must be a tuple of files, got a string"):
        example.__post_init__()
