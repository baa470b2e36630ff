"""Pictures and sounds: read as they are, brought to what a model takes, or refused."""

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

from affectlens.errors import MissingExtra, Remark, TaskError
from affectlens.tasks import open_picture, open_sound


def test_pictures_are_cut_from_sheets(tmp_path: Path) -> None:
    """A media fragment cuts one picture from a sheet; a fragment outside the sheet is an error."""
    sheet = Image.new("RGB", (20, 10), "white")
    sheet.putpixel((12, 3), (255, 0, 0))
    sheet.save(tmp_path / "sheet.png")
    (tmp_path / "text.png").write_text("no picture")

    assert (255, 0, 0) == open_picture(f"{tmp_path}/sheet.png#xywh=10,0,10,10").getpixel((2, 3))
    for source, message in (
        (f"{tmp_path}/sheet.png#xywh=15,0,10,10", "not inside its sheet of 20 × 10 pixels"),
        (f"{tmp_path}/none.png", "no such picture"),
        (f"{tmp_path}/text.png", "can't be read"),
    ):
        with pytest.raises(TaskError, match=message):
            open_picture(source)


def tone(path: Path, *, rate: int = 16_000, hertz: float = 440.0, seconds: float = 0.5, dtype: str = "int16",
         channels: int = 1) -> Path:  # fmt: skip
    """Write a sine at half the largest value as a WAV file."""
    values = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    kind = np.dtype(dtype)
    if kind.kind == "i":
        values = values * -float(np.iinfo(kind).min)
    if kind.kind == "u":
        values = values * 128 + 128
    wavfile.write(path, rate, np.repeat(values.astype(kind)[:, None], channels, axis=1).squeeze())
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_sounds_are_parts_of_the_largest_value(dtype: str, tmp_path: Path) -> None:
    """Half of the largest value is 0.5 in every sample format."""
    sound = open_sound(str(tone(tmp_path / "a.wav", dtype=dtype)), 16_000)

    assert (np.float32, 8000) == (sound.dtype, len(sound))
    assert pytest.approx(0.5, abs=0.01) == sound.max()
    assert pytest.approx(-0.5, abs=0.01) == sound.min()


def test_24_bits_are_read(tmp_path: Path) -> None:
    """Samples of three bytes, as recorders write them, are read."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(3)
        stream.setframerate(16_000)
        stream.writeframes(b"\x00\x00\x40" * 100)  # 0x400000, half of 2^23

    assert pytest.approx(0.5) == open_sound(str(tmp_path / "a.wav"), 16_000).max()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_sounds_are_resampled(rate: int, tmp_path: Path) -> None:
    """A tone recorded at another rate becomes the same tone at the model's rate."""
    same = open_sound(str(tone(tmp_path / "a.wav")), 16_000)
    other = open_sound(str(tone(tmp_path / "b.wav", rate=rate)), 16_000)

    assert len(same) == len(other)
    inner = slice(1000, -1000)  # a filter rings where a sound begins and ends
    np.testing.assert_allclose(same[inner], other[inner], atol=0.01)


def test_channels_are_averaged(tmp_path: Path) -> None:
    """A sound on only one of two channels is half as loud."""
    left = np.zeros((1000, 2), np.float32)
    left[:, 0] = 0.8
    wavfile.write(tmp_path / "a.wav", 16_000, left)

    np.testing.assert_allclose(0.4, open_sound(str(tmp_path / "a.wav"), 16_000))


def test_sounds_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes, devices, URLs, and files that are broken, empty or lie about their size are errors, at once."""
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
    # A size that lies is no more than the file.
    with pytest.warns(Remark, match="states 4,294,967,295 bytes of samples, the file has 16"):
        assert 8 == len(open_sound(str(tmp_path / "wide.wav"), 16_000))
    assert 8000 == len(open_sound(str(tmp_path / "huge.wav"), 16_000))
    assert 5 > time.monotonic() - began


def test_other_sounds_take_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of another format names the extra that reads it."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.mp3").write_bytes(b"ID3\x03" + bytes(100))
    with pytest.raises(MissingExtra, match=r"need soundfile: pip install 'affectlens\[media\]'"):
        open_sound(str(tmp_path / "a.mp3"), 16_000)
