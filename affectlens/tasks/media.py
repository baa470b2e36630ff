"""Open pictures and sounds within fixed limits of size.

A picture is a whole file, or one picture of a sheet, given by a W3C media fragment (`#xywh=x,y,w,h`).
"""

import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from affectlens.errors import CheckpointError, MissingExtra, TaskError, quoted
from affectlens.files import opened

_FRAGMENT = re.compile(r"^(?P<file>.+)#xywh=(?P<x>\d{1,9}),(?P<y>\d{1,9}),(?P<w>\d{1,9}),(?P<h>\d{1,9})$")
# Without EPS, on which Pillow would run Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LARGEST_SOUND = 500_000_000  # bytes
_LARGEST_PICTURE = 500_000_000  # bytes
_SAMPLES = 200_000_000  # of all channels: more than three hours at 16 kHz and one channel
_RATES = range(1_000, 384_001)  # Hz; the length of the filter follows from the rate that a file states


def open_picture(source: str) -> Image.Image:
    """Open a picture as RGB: a file, or the part `#xywh=x,y,w,h` of one.

    Raises `TaskError` for a picture that is missing, broken or too large, or lies outside its sheet.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Image.new("L", (64, 32)).save(f"{folder}/sheet.png")
    ...     open_picture(f"{folder}/sheet.png#xywh=32,0,32,32").size
    (32, 32)
    """
    match = _FRAGMENT.match(source)
    if match is None:
        return _opened(source)
    x, y, w, h = (int(match[name]) for name in "xywh")
    sheet = _sheet(match["file"])
    if not (w and h and x + w <= sheet.width and y + h <= sheet.height):
        raise TaskError(f"{quoted(source)}: not inside its sheet of {sheet.width} × {sheet.height} pixels")
    return sheet.crop((x, y, x + w, y + h))


@lru_cache(maxsize=4)  # most tasks list the pictures of a sheet one after the other
def _sheet(file: str) -> Image.Image:
    return _opened(file)


def _opened(file: str) -> Image.Image:
    with decoding(file) as image:
        return image.convert("RGB")


@contextmanager
def decoding(file: str, what: str = "picture") -> Iterator[Image.Image]:
    """Open a picture inside a block. Raises `TaskError`, also where decoding in the block fails."""
    path = ordinary(file, what, most=_LARGEST_PICTURE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                yield image
    except TaskError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise TaskError(f"{quoted(file)}: this {what} has more than {most} pixels") from None
    except Exception:  # each decoder raises errors of its own
        raise TaskError(f"{quoted(file)}: this {what} can't be read") from None


def ordinary(source: str, what: str, *, most: int) -> Path:
    """Return the path if it is an ordinary file that is not too large. Raises `TaskError`."""
    try:
        state = Path(source).stat()
    except (OSError, ValueError):
        raise TaskError(f"{quoted(source)}: no such {what}") from None
    if not stat.S_ISREG(state.st_mode):
        raise TaskError(f"{quoted(source)}: this is not an ordinary file")  # a pipe or device would never end
    if state.st_size > most:
        raise TaskError(f"{quoted(source)}: larger than {most:,} bytes")
    return Path(source)


def _content(source: str, what: str, *, most: int) -> bytes:
    """Read a file. Raises `TaskError` for one that is missing, can't be read, or is too large."""
    path = ordinary(source, what, most=most)
    try:
        with os.fdopen(opened(path), "rb") as stream:
            found = stream.read(most + 1)
    except (CheckpointError, OSError):
        raise TaskError(f"{quoted(source)}: this {what} can't be read") from None
    if len(found) > most:
        raise TaskError(f"{quoted(source)}: larger than {most:,} bytes")
    return found


def open_sound(source: str, rate: int) -> Float[np.ndarray, " time"]:
    """Open a sound as float32 in −1…1: the mean of its channels, resampled to `rate` (Hz).

    Resampling uses a polyphase filter (`scipy.signal.resample_poly`). Raises `TaskError` for a sound that is
    missing, broken, empty or too long, and `MissingExtra` where the format needs another package.

    >>> from tempfile import TemporaryDirectory
    >>> from scipy.io import wavfile
    >>> with TemporaryDirectory() as folder:
    ...     wavfile.write(f"{folder}/a.wav", 8_000, np.full(8_000, 2**14, np.int16))
    ...     open_sound(f"{folder}/a.wav", rate=16_000).shape
    (16000,)
    """
    found = _content(source, "sound", most=_LARGEST_SOUND)
    wave = found[:4] in (b"RIFF", b"RIFX", b"RF64") and found[8:12] == b"WAVE"
    samples, own = _wave(found, source) if wave else _other(found, source)
    if not samples.size:
        raise TaskError(f"{quoted(source)}: this sound is empty")
    if own not in _RATES:
        known = f"{_RATES.start:,}–{_RATES.stop - 1:,}"
        raise TaskError(f"{quoted(source)}: unsupported sample rate {own:,} Hz ({known})")
    if not np.isfinite(samples).all():
        raise TaskError(f"{quoted(source)}: this sound has samples that are NaN or infinite")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    if own != rate:
        from scipy.signal import resample_poly

        shared = math.gcd(own, rate)
        mono = resample_poly(mono, rate // shared, own // shared)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _wave(found: bytes, source: str) -> tuple[np.ndarray, int]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of chunks that it skips
            rate, samples = wavfile.read(io.BytesIO(found))
        _refuse_longer(samples.size, source)
        return _scaled(samples), int(rate)
    except TaskError:
        raise
    except Exception:  # a broken header can raise anything
        raise TaskError(f"{quoted(source)}: this sound can't be read") from None


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Return samples as float32 in −1…1; unsigned ones have their zero in the middle."""
    if samples.dtype.kind == "u":
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        return (samples.astype(np.float32) - np.float32(half)) / np.float32(half)
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    return samples.astype(np.float32)


def _other(found: bytes, source: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the library that it binds is missing
        raise MissingExtra(
            f"{quoted(source)} is not a WAV file. Other formats need soundfile: "
            "pip install 'affectlens[media]'"
        ) from None
    return _decoded(soundfile, found, source)


def _decoded(soundfile: Any, found: bytes, source: str) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(found)) as stream:
            _refuse_longer(stream.frames * stream.channels, source)
            return stream.read(dtype="float32", always_2d=True), int(stream.samplerate)
    except TaskError:
        raise
    except Exception:
        raise TaskError(f"{quoted(source)}: this sound can't be read") from None


def _refuse_longer(size: int, source: str) -> None:
    if size > _SAMPLES:
        raise TaskError(f"{quoted(source)}: a sound of {size:,} samples, the limit is {_SAMPLES:,}")
