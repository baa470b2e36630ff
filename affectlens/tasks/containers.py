"""Open containers of film and sound: MP4, QuickTime, WebM, Matroska and AVI, with the package av (PyAV)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from affectlens.errors import MissingExtra, TaskError, quoted
from affectlens.tasks.media import ordinary

_LARGEST = 4_000_000_000  # bytes
# Position and bytes of a container's signature → its name in ffmpeg; opened_container says what for.
_SIGNS = {
    (4, b"ftyp"): "mp4",
    (0, b"\x1a\x45\xdf\xa3"): "matroska",
    (8, b"AVI "): "avi",
}


def container_of(source: str, what: str) -> str | None:
    """Return ffmpeg's name of the container that a file begins as; None for none. Raises `TaskError`."""
    with open(ordinary(source, what, most=_LARGEST), "rb") as stream:
        head = stream.read(16)
    for (start, sign), name in _SIGNS.items():
        if head[start : start + len(sign)] == sign:
            return name
    return None


@contextmanager
def opened_container(source: str, name: str, *, what: str) -> Iterator[Any]:
    """Open a container inside a block. Raises `TaskError`, also where decoding in the block fails."""
    try:
        import av
    except ImportError:
        raise MissingExtra(
            f"{quoted(Path(source).name)} is a video file, which needs av: pip install 'affectlens[media]', "
            "or give its frames as a folder or list of pictures, and its sound as a WAV file"
        ) from None
    try:
        # With the container named, ffmpeg can't take the file for a playlist and open the files it lists.
        with open(source, "rb") as stream, av.open(stream, format=name) as opened:
            yield opened
    except TaskError as error:
        raise TaskError(f"{quoted(source)}: {error}") from None
    except Exception:
        raise TaskError(f"{quoted(source)}: this {what} can't be read") from None


def has_sound(source: str) -> bool:
    """Return whether a film file has a sound track that is not empty. Raises `TaskError`, `MissingExtra`."""
    name = container_of(source, "film")
    if name is None:
        return False
    with opened_container(source, name, what="film") as opened:
        return any(True for stream in opened.streams.audio[:1] for _ in opened.decode(stream))


def sound_track(source: str, name: str, *, most: int) -> tuple[Float[np.ndarray, "time channel"], int]:
    """Decode the first sound track of a container; return it with its rate.

    Raises `TaskError` where there is none, and for more than `most` samples of all channels.
    """
    with opened_container(source, name, what="sound") as opened:
        if not opened.streams.audio:
            raise TaskError("this file has no sound track")
        return _samples(opened, opened.streams.audio[0], most)


def _samples(opened: Any, stream: Any, most: int) -> tuple[np.ndarray, int]:
    import av

    # Of any sample format to float32 in −1…1; rate and channels stay.
    converter = av.AudioResampler(format="fltp")
    parts: list[np.ndarray] = []
    size = 0
    for frame in opened.decode(stream):
        for one in converter.resample(frame):
            parts.append(one.to_ndarray().T)
            size += parts[-1].size
            if size > most:
                raise TaskError(f"a sound of more than {most:,} samples")
    for one in converter.resample(None):
        parts.append(one.to_ndarray().T)
    if not parts:
        raise TaskError("this sound is empty")
    return np.concatenate(parts), int(stream.rate)
