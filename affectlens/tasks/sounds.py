"""Open sounds: one channel, at the rate a model hears at.

WAV is read with scipy alone; every other container takes the `soundfile` package (the extra `media`).
"""

import io
import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from affectlens.errors import MissingExtra, TaskError, quoted
from affectlens.tasks.opening import content

_LARGEST = 500_000_000  # bytes
_SAMPLES = 200_000_000  # of all channels; at 16 kHz and one channel more than three hours
_RATES = range(1_000, 384_001)  # Hz; a filter's length follows from the rates, and a file says its own


def open_sound(source: str, rate: int) -> Float[np.ndarray, " time"]:
    """Open a sound as float32 in −1…1: the mean of its channels, resampled to `rate` (Hz).

    Resampling is by polyphase filtering (`scipy.signal.resample_poly`). Raises `TaskError` for a file that
    is missing, broken, empty or too long, and `MissingExtra` where reading it takes a package.
    """
    found = content(source, "sound", most=_LARGEST)
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
