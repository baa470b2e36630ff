"""Open sounds as a model takes them: one channel of float32 at the model's rate."""

import io
import math
import warnings

import numpy as np
from jaxtyping import Float

from affectlens.errors import MissingExtra, TaskError, quoted, warn
from affectlens.tasks.containers import container_of, sound_track
from affectlens.tasks.media import content
from affectlens.tasks.waves import CODECS, FLOAT, PCM, Wave, is_wave, take_apart

_LARGEST = 500_000_000  # bytes
_SAMPLES = 200_000_000  # of all channels: more than three hours at 16 kHz and one channel
_RATES = range(1_000, 384_001)  # Hz; the length of the filter follows from the rate that a file states


def open_sound(source: str, rate: int) -> Float[np.ndarray, " time"]:
    """Open a sound as float32 in −1…1: the mean of its channels, resampled to `rate` (Hz).

    WAV files of integers and floating-point numbers need no other package. The package soundfile reads the
    other codecs of WAV (µ-law, A-law, ADPCM, …), FLAC, Ogg, MP3, AIFF and AU, and av the sound track of a
    film. A WAV file that is cut or states a wrong size is read as far as it goes, with a `Remark`.

    Resampling uses a polyphase filter (`scipy.signal.resample_poly`). Raises `TaskError` for a sound that is
    missing, broken, empty or too long, and `MissingExtra` where the format needs another package.

    >>> from tempfile import TemporaryDirectory
    >>> from scipy.io import wavfile
    >>> with TemporaryDirectory() as folder:
    ...     wavfile.write(f"{folder}/a.wav", 8_000, np.full(8_000, 2**14, np.int16))
    ...     open_sound(f"{folder}/a.wav", rate=16_000).shape
    (16000,)
    """
    samples, own = _opened(source)
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


def _opened(source: str) -> tuple[np.ndarray, int]:
    """Return the samples of a file, (time) or (time, channel), and their rate."""
    container = container_of(source, "sound")
    if container is not None:
        return sound_track(source, container, most=_SAMPLES)
    found = content(source, "sound", most=_LARGEST)
    if not is_wave(found):
        return _decoded(found, source, needs="is not a WAV file. Other formats need")
    try:
        wave = take_apart(found)
    except TaskError as error:
        raise TaskError(f"{quoted(source)}: {error}") from None
    if wave.wrong:
        warn(f"{quoted(source)}: {wave.wrong}")
    if wave.codec in (PCM, FLOAT):
        return _plain(wave, source)
    if wave.codec not in CODECS:
        raise TaskError(f"{quoted(source)}: this sound can't be read: unknown codec {wave.codec:#06x}")
    return _decoded(wave.file, source, needs=f"is a WAV file of {CODECS[wave.codec]} samples, which need")


def _plain(wave: Wave, source: str) -> tuple[np.ndarray, int]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of chunks that it skips
            rate, samples = wavfile.read(io.BytesIO(wave.file))
    except Exception:  # a broken header can raise anything
        raise TaskError(f"{quoted(source)}: this sound can't be read") from None
    _refuse_longer(samples.size, source)
    return _scaled(samples), int(rate)


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Return samples as float32 in −1…1; unsigned ones have their zero in the middle."""
    if samples.dtype.kind == "u":
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        return (samples.astype(np.float32) - np.float32(half)) / np.float32(half)
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    return samples.astype(np.float32)


def _decoded(found: bytes, source: str, *, needs: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the library that it binds is missing
        raise MissingExtra(f"{quoted(source)} {needs} soundfile: pip install 'affectlens[media]'") from None
    try:
        with soundfile.SoundFile(io.BytesIO(found)) as stream:
            stated = stream.frames * stream.channels
            _refuse_longer(stated, source)
            # Some codecs have to be told how many frames to read.
            samples = stream.read(stream.frames, dtype="float32", always_2d=True)
            rate = int(stream.samplerate)
    except TaskError:
        raise
    except Exception:
        raise TaskError(f"{quoted(source)}: this sound can't be read") from None
    if samples.size < stated:
        warn(
            f"{quoted(source)}: its header states {stated:,} samples, the file has {samples.size:,}; what is "
            f"there is used"
        )
    return samples, rate


def _refuse_longer(size: int, source: str) -> None:
    if size > _SAMPLES:
        raise TaskError(f"{quoted(source)}: a sound of {size:,} samples, the limit is {_SAMPLES:,}")
