"""Sounds: read as soundfile and scipy read them, brought to what a model takes, or refused."""

import os
import struct
import sys
import time
import warnings
import wave
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from affectlens.errors import MissingExtra, Remark, TaskError
from affectlens.tasks import open_sound
from tests import clips


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
    for codec, name in ((7, "µ-law"), (6, "A-law"), (0x11, "ADPCM")):
        (tmp_path / "a.wav").write_bytes(wav(b"\0" * 64, codec=codec, bits=8))
        with pytest.raises(MissingExtra, match=f"is a WAV file of {name} samples, which need soundfile"):
            open_sound(str(tmp_path / "a.wav"), 16_000)


def wav(
    samples: bytes, *, codec: int = 1, bits: int = 16, stated: int | None = None, behind: bytes = b""
) -> bytes:
    """Write a WAV file of one channel at 16 kHz by hand, with any size in the header of its samples."""
    size = bits // 8
    fmt = struct.pack("<HHIIHH", codec, 1, 16_000, 16_000 * size, size, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data"
    body += struct.pack("<I", len(samples) if stated is None else stated) + samples + behind
    return b"RIFF" + struct.pack("<I", len(body)) + body


SAMPLES = np.arange(-500, 500, dtype=np.int16)
NOTES = b"LIST" + struct.pack("<I", 4) + b"INFO"


@pytest.mark.parametrize(
    ("stated", "behind", "length", "message"),
    [
        (4000, b"", 1000, "its header states 4,000 bytes of samples, the file has 2,000: it is cut"),
        (2**32 - 1, b"", 1000, "states 4,294,967,295 bytes of samples, the file has 2,000"),
        (0, b"", 1000, "its header states no samples, the file has 2,000 bytes; all are used"),
        (
            1000,
            b"",
            500,
            "states 1,000 bytes of samples, and 1,000 more bytes follow that belong to no chunk",
        ),
        (2001, b"", 1000, "the file has 2,000"),
        (2000, b"", 1000, ""),
        (2000, NOTES, 1000, ""),
        (2000, b"\0" * 4, 1000, ""),
        (0, NOTES, 1000, "states no samples"),
    ],
)
def test_a_wrong_size_is_told(stated: int, behind: bytes, length: int, message: str, tmp_path: Path) -> None:
    """A file that is cut, was never finished or states another size is read, with a remark."""
    file = tmp_path / "a.wav"
    file.write_bytes(wav(SAMPLES.tobytes(), stated=stated, behind=behind))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = open_sound(str(file), 16_000)

    if not (stated == 0 and behind):  # what follows was taken for samples, as its header says none
        np.testing.assert_array_equal(SAMPLES[:length].astype(np.float32) / 2**15, found)
    assert bool(message) == len(caught)
    assert message in "".join(str(one.message) for one in caught)


@pytest.mark.parametrize("bits", [8, 24, 32])
def test_a_cut_may_go_through_a_sample(bits: int, tmp_path: Path) -> None:
    """The whole samples before it are used."""
    content = wav(bytes(range(240)), bits=bits)
    (tmp_path / "a.wav").write_bytes(content)
    (tmp_path / "cut.wav").write_bytes(content[:-1])
    whole = open_sound(str(tmp_path / "a.wav"), 16_000)
    with pytest.warns(Remark, match="the file has 239: it is cut"):
        cut = open_sound(str(tmp_path / "cut.wav"), 16_000)

    np.testing.assert_array_equal(whole[:-1], cut)


@pytest.mark.parametrize("name", ["WAV", "WAVEX", "RF64"])
def test_every_codec_is_as_soundfile_reads_it(name: str, tmp_path: Path) -> None:
    """µ-law, A-law, every ADPCM, GSM, integers of 8 to 32 bits, floating point, extensible headers."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile reads and writes these")
    known = set(soundfile.available_subtypes(name)) - {"MPEG_LAYER_III"}  # which it reads alone
    assert {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"} <= known
    both = np.stack([clips.tone()[:, 0] / 2**15, np.zeros(clips.LENGTH)], axis=1)
    for codec in sorted(known):
        few = any(part in codec for part in ("G72", "GSM", "NMS"))  # these have one channel
        file = str(tmp_path / f"{codec}.wav")
        soundfile.write(file, both[:, :1] if few else both, clips.RATE, subtype=codec, format=name)
        expected = soundfile.read(file, dtype="float32", always_2d=True)[0].mean(1)

        np.testing.assert_array_equal(expected, open_sound(file, clips.RATE), err_msg=codec)


@pytest.mark.parametrize("codec", ["ULAW", "ALAW", "MS_ADPCM", "IMA_ADPCM"])
def test_a_cut_of_other_codecs_is_told(codec: str, tmp_path: Path) -> None:
    """What is there is the beginning of the whole."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile reads and writes these")
    file = tmp_path / "a.wav"
    soundfile.write(str(file), clips.tone(), clips.RATE, subtype=codec)
    whole = open_sound(str(file), clips.RATE)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 1])
    with pytest.warns(Remark, match="it is cut"):
        cut = open_sound(str(file), clips.RATE)

    assert 0.4 < len(cut) / len(whole) < 0.6
    np.testing.assert_array_equal(whole[: len(cut)], cut)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.aiff", "a.au"])
def test_other_formats_are_as_soundfile_reads_them(name: str, tmp_path: Path) -> None:
    """They are told by their content, not by their name."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile reads and writes these")
    soundfile.write(str(tmp_path / name), clips.tone(), clips.RATE)
    (tmp_path / name).rename(tmp_path / "a.wav")
    expected = soundfile.read(str(tmp_path / "a.wav"), dtype="float32")[0]

    np.testing.assert_allclose(open_sound(str(tmp_path / "a.wav"), clips.RATE), expected, atol=1e-6)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "aac"), ("a.avi", "pcm_s16le")])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_sound_of_a_film(name: str, codec: str, channels: int, tmp_path: Path) -> None:
    """A film as a sound is its sound track: the tone that went in, the mean of its channels."""
    pytest.importorskip("av", reason="av reads and writes films")
    file = clips.film(tmp_path / name, codec=codec, channels=channels)
    found, expected = open_sound(str(file), clips.RATE), clips.tone(channels).mean(1) / 2**15

    assert pytest.approx(len(expected), abs=1024) == len(found)
    if codec == "pcm_s16le":
        np.testing.assert_allclose(expected, found, atol=1e-6)
    inner = slice(2000, 10_000)
    assert 0.99 < max(
        np.corrcoef(expected[inner], found[inner.start + shift : inner.stop + shift])[0, 1]
        for shift in (0, 1024)
    )


def test_sounds_of_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without pictures is a sound, one without sound is none, and both need av."""
    pytest.importorskip("av", reason="av reads and writes films")
    alone = str(clips.film(tmp_path / "a.m4a", pictures=False))
    silent = str(clips.film(tmp_path / "a.mp4", sound=False))

    assert pytest.approx(clips.LENGTH, abs=1024) == len(open_sound(alone, clips.RATE))
    with pytest.raises(TaskError, match=r"a\.mp4': this file has no sound track"):
        open_sound(silent, clips.RATE)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"needs av: pip install 'affectlens\[media\]', or .* WAV file"):
        open_sound(silent, clips.RATE)
