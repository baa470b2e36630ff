"""Open pictures, whole files or one out of a sheet by a W3C media fragment (`#xywh=x,y,w,h`)."""

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
# Formats of pictures alone: Pillow would run Ghostscript on an EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LARGEST_SOUND = 500_000_000  # bytes
_LARGEST_PICTURE = 500_000_000  # bytes
_SAMPLES = 200_000_000  # of all channels; at 16 kHz and one channel more than three hours
_RATES = range(1_000, 384_001)  # Hz; a filter's length follows from the rates, and a file says its own


def open_picture(source: str) -> Image.Image:
    """Open a picture as RGB; raises `TaskError` for a missing, unreadable, huge or out-of-sheet one."""
    match = _FRAGMENT.match(source)
    if match is None:
        return _opened(source)
    x, y, w, h = (int(match[name]) for name in "xywh")
    sheet = _sheet(match["file"])
    if not (w and h and x + w <= sheet.width and y + h <= sheet.height):
        raise TaskError(f"{quoted(source)}: the sheet is only {sheet.width} × {sheet.height} pixels")
    return sheet.crop((x, y, x + w, y + h))


@lru_cache(maxsize=4)  # the pictures of a sheet mostly come one after the other
def _sheet(file: str) -> Image.Image:
    return _opened(file)


def _opened(file: str) -> Image.Image:
    with decoding(file) as image:
        return image.convert("RGB")


@contextmanager
def decoding(file: str, what: str = "picture") -> Iterator[Image.Image]:
    """Open a picture for a block; raises `TaskError` for what is none, or breaks in the block."""
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
        raise TaskError(f"{quoted(file)}: a picture of more than {most} pixels is not opened") from None
    except Exception:  # each format has its own ways of being broken
        raise TaskError(f"{quoted(file)}: this {what} can't be read") from None


def ordinary(source: str, what: str, *, most: int) -> Path:
    """The path of a file that can be opened. Raises `TaskError` for what is none, or is too large."""
    try:
        state = Path(source).stat()
    except (OSError, ValueError):
        raise TaskError(f"{quoted(source)}: there is no such {what}") from None
    if not stat.S_ISREG(state.st_mode):
        raise TaskError(f"{quoted(source)}: this is not an ordinary file")  # a pipe or device would never end
    if state.st_size > most:
        raise TaskError(f"{quoted(source)}: larger than {most:,} bytes")
    return Path(source)


def content(source: str, what: str, *, most: int) -> bytes:
    """The bytes of a file. Raises `TaskError` for what is none, can't be read, or is too large."""
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

    Resampling is by polyphase filtering (`scipy.signal.resample_poly`). Raises `TaskError` for a file that
    is missing, broken, empty or too long, and `MissingExtra` where reading it takes a package.
    """
    found = content(source, "sound", most=_LARGEST_SOUND)
    wave = found[:4] in (b"RIFF", b"RIFX", b"RF64") and found[8:12] == b"WAVE"
    samples, own = _wave(found, source) if wave else _other(found, source)
    if not samples.size:
        raise TaskError(f"{quoted(source)}: this sound is empty")
    if own not in _RATES:
        raise TaskError(f"{quoted(source)}: a sound of {own:,} samples a second is not read")
    if not np.isfinite(samples).all():
        raise TaskError(f"{quoted(source)}: this sound holds values that are no numbers")
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
            warnings.simplefilter("ignore")  # of chunks that hold no sound
            rate, samples = wavfile.read(io.BytesIO(found))
        _refuse_longer(samples.size, source)
        return _scaled(samples), int(rate)
    except TaskError:
        raise
    except Exception:  # a header can be broken in many ways
        raise TaskError(f"{quoted(source)}: this sound can't be read") from None


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Whole numbers as parts of the largest one; 8 bits have their zero in the middle."""
    if samples.dtype.kind == "u":
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        return (samples.astype(np.float32) - np.float32(half)) / np.float32(half)
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    return samples.astype(np.float32)


def _other(found: bytes, source: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError):  # the package, or the library that it binds
        raise MissingExtra(
            f"{quoted(source)} is no WAV file, and reading others takes soundfile: "
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
        raise TaskError(f"{quoted(source)}: a sound of {size:,} samples; most are {_SAMPLES:,}")
