"""Open films: a folder or list of frame pictures, an animated GIF, WebP or PNG, or a video file.

Of a long film, frames at even distances are taken, with the first and the last. Pillow reads animations; MP4,
WebM and AVI need the `av` package (the extra `media`).
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from affectlens.errors import MissingExtra, TaskError, quoted
from affectlens.tasks.media import decoding, open_picture, ordinary

FRAMES = 32  # of a film that a model is shown by default, at most
_LONGEST = 100_000  # frames of a film, or files of its folder
_PIXELS = 10_000_000_000  # of all frames of an animation: each is decoded to reach the next
_LARGEST = 4_000_000_000  # bytes
_PICTURE = re.compile(r".+\.(?:png|jpe?g|webp|gif|bmp|tiff?|ppm)", re.IGNORECASE)
# Position and bytes of a container's signature → its name in ffmpeg. ffmpeg must not guess: see _video.
_SIGNS = {
    (4, b"ftyp"): "mp4",
    (0, b"\x1a\x45\xdf\xa3"): "matroska",
    (8, b"AVI "): "avi",
}


@dataclass(frozen=True)
class Film:
    """The frames of a film that a model is shown, all of one size, and their number per second."""

    frames: tuple[Image.Image, ...]
    fps: float | None = None  # None for pictures, which have no clock


def open_film(source: str | Sequence[str], most: int = FRAMES) -> Film:
    """Open a film: a file, a folder of pictures in the order of their names, or a sequence of pictures.

    Of more than `most` frames, `most` are taken: the k-th is number k · (n − 1) / (most − 1), rounded.
    Numbers in names are sorted as numbers: `f2.png` comes before `f10.png`.

    Raises `TaskError` for a film that can't be read, is empty, or has frames of several sizes, and
    `MissingExtra` where the format needs another package.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for number in range(9):
    ...         Image.new("RGB", (2, 2), (number, 0, 0)).save(f"{folder}/f{number}.png")
    ...     film = open_film(folder, most=3)
    >>> [frame.getpixel((0, 0))[0] for frame in film.frames]
    [0, 4, 8]
    """
    if not isinstance(source, str):
        film = _pictures(tuple(source), most, name=_first(source))
    elif Path(source).is_dir():
        film = _pictures(tuple(_inside(source)), most, name=source)
    else:
        film = _file(source, most)
    sizes = {frame.size for frame in film.frames}
    if len(sizes) > 1:
        shown = ", ".join(f"{w} × {h}" for w, h in sorted(sizes)[:3])
        raise TaskError(f"{quoted(_first(source))}: all frames of a film must have one size, got {shown}")
    return film


def even(count: int, most: int) -> list[int]:
    """Return the numbers of the frames to take: all `count`, or `most` at even distances from first to last.

    >>> even(3, 8), even(10, 4), even(10, 1)
    ([0, 1, 2], [0, 3, 6, 9], [0])
    """
    return [int(n) for n in np.linspace(0, count - 1, min(count, most)).round()]


def _first(source: str | Sequence[str]) -> str:
    return source if isinstance(source, str) else next(iter(source), "a film without frames")


def _pictures(files: tuple[str, ...], most: int, *, name: str) -> Film:
    if not files:
        raise TaskError(f"{quoted(name)}: this film has no frames")
    return Film(tuple(open_picture(files[n]) for n in even(len(files), most)))


def _inside(folder: str) -> list[str]:
    """Return the pictures of a folder in the order of their names.

    Raises `TaskError` for a link out of the folder: the user pointed to this folder, not to its target.
    """
    root = os.path.realpath(folder)
    found = []
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= _LONGEST:
                raise TaskError(f"{quoted(folder)}: the folder of a film has more than {_LONGEST:,} files")
            if not _PICTURE.fullmatch(entry.name):
                continue
            if os.path.dirname(os.path.realpath(entry.path)) != root:  # noqa: PTH120  pathlib would change the string
                raise TaskError(f"{quoted(entry.path)}: a link out of the folder of its film")
            found.append(entry.path)
    return sorted(found, key=_counted)


def _counted(path: str) -> tuple[list[str | int], str]:
    """Return a sort key in which text and numbers alternate, so that numbers are compared with numbers."""
    name = Path(path).name
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"([0-9]{1,18})", name))], name


def _file(source: str, most: int) -> Film:
    path = ordinary(source, "film", most=_LARGEST)
    with open(path, "rb") as stream:
        head = stream.read(16)
    for (start, sign), container in _SIGNS.items():
        if head[start : start + len(sign)] == sign:
            return _video(path, container, most)
    with decoding(source, "film") as image:
        return _animation(image, source, most)


def _animation(image: Image.Image, source: str, most: int) -> Film:
    count = getattr(image, "n_frames", 1)
    if count > _LONGEST or count * image.width * image.height > _PIXELS:
        raise TaskError(
            f"{quoted(source)}: {count:,} frames of {image.width} × {image.height} pixels; the limits are "
            f"{_LONGEST:,} frames and {_PIXELS:,} pixels in all"
        )
    wanted, frames, milliseconds = set(even(count, most)), [], 0.0
    for number in range(count):
        image.seek(number)
        image.load()  # some formats know the duration of a frame only once it is loaded
        milliseconds += float(image.info.get("duration", 0))
        if number in wanted:
            frames.append(image.convert("RGB"))
    return Film(tuple(frames), len(frames) / milliseconds * 1000 if milliseconds > 0 else None)


def _video(path: Path, container: str, most: int) -> Film:
    try:
        import av
    except ImportError:
        raise MissingExtra(
            f"{quoted(path.name)} is a video file, which needs av: pip install 'affectlens[media]', "
            "or give its frames as a folder or list of pictures"
        ) from None
    try:
        # With the container named, ffmpeg can't take the file for a playlist and open the files it lists.
        with open(path, "rb") as stream, av.open(stream, format=container) as opened:
            return _decoded(opened, most)
    except TaskError as error:
        raise TaskError(f"{quoted(str(path))}: {error}") from None
    except Exception:
        raise TaskError(f"{quoted(str(path))}: this film can't be read") from None


def _decoded(opened: Any, most: int) -> Film:
    """Decode in two passes, the first to count the frames: a header may state any number."""
    stream = opened.streams.video[0]
    count = sum(1 for _ in _bounded(opened.decode(stream)))
    if not count:
        raise TaskError("this film has no frames")
    opened.seek(0)
    wanted = set(even(count, most))
    frames = [
        frame.to_image().convert("RGB")
        for number, frame in enumerate(_bounded(opened.decode(stream)))
        if number in wanted
    ]
    rate = float(stream.average_rate or 0)
    return Film(tuple(frames), len(frames) * rate / count if rate > 0 else None)


def _bounded(frames: Iterator[Any]) -> Iterator[Any]:
    for number, frame in enumerate(frames):
        if number >= _LONGEST:
            raise TaskError(f"this film has more than {_LONGEST:,} frames")
        if frame.width * frame.height > (Image.MAX_IMAGE_PIXELS or 0):
            raise TaskError(f"a frame has more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        yield frame
