"""Open films: a folder or list of frame pictures, an animated GIF, WebP or PNG, or a video file.

Of many frames some are taken at even distances, the first and the last among them. Animations are read with
Pillow alone; MP4, WebM and AVI take the `av` package (the extra `media`).
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

FRAMES = 32  # of a film, at most, that a model is shown
_LONGEST = 100_000  # frames that are looked at for those to take
_PIXELS = 10_000_000_000  # of all frames of an animation: they are decoded one after the other
_LARGEST = 4_000_000_000  # bytes
_PICTURE = re.compile(r".+\.(?:png|jpe?g|webp|gif|bmp|tiff?|ppm)", re.IGNORECASE)
# The first bytes of a container, and where they are → its name to ffmpeg, which is not left to guess.
_SIGNS = {
    (4, b"ftyp"): "mp4",
    (0, b"\x1a\x45\xdf\xa3"): "matroska",
    (8, b"AVI "): "avi",
}


@dataclass(frozen=True)
class Film:
    """Hold the frames of a film that are shown, all of one size, and how many there are of them a second."""

    frames: tuple[Image.Image, ...]
    fps: float | None = None  # None where nothing says so: pictures have no clock


def open_film(source: str | Sequence[str], most: int = FRAMES) -> Film:
    """Open a film: a file, a folder of pictures in the order of their names, or a sequence of pictures.

    Where there are more than `most` frames, `most` of them are taken: the k-th is number
    k · (n − 1) / (most − 1), rounded. Numbers in names count as such: `f2.png` comes before `f10.png`.

    Raises `TaskError` for what can't be read, is empty, or has frames of several sizes, and `MissingExtra`
    where reading it takes a package.
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
        raise TaskError(f"{quoted(_first(source))}: the frames of a film have one size; here: {shown}")
    return film


def even(count: int, most: int) -> list[int]:
    """Which of `count` frames are taken: all, or `most` at even distances from the first to the last.

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
    """The pictures of a folder, by name; a link out of it is nothing that its user pointed to."""
    root = os.path.realpath(folder)
    found = []
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= _LONGEST:
                raise TaskError(f"{quoted(folder)}: a folder of more than {_LONGEST:,} files is no film")
            if not _PICTURE.fullmatch(entry.name):
                continue
            if os.path.dirname(os.path.realpath(entry.path)) != root:  # noqa: PTH120  of any string
                raise TaskError(f"{quoted(entry.path)}: links out of the folder of its film")
            found.append(entry.path)
    return sorted(found, key=_counted)


def _counted(path: str) -> tuple[list[str | int], str]:
    """A key by which numbers in a name count: text and numbers take turns, so that like meets like."""
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
        raise TaskError(f"{quoted(source)}: {count:,} frames of {image.width} × {image.height} are too many")
    wanted, frames, milliseconds = set(even(count, most)), [], 0.0
    for number in range(count):
        image.seek(number)
        image.load()  # some formats say only then for how long a frame stands
        milliseconds += float(image.info.get("duration", 0))
        if number in wanted:
            frames.append(image.convert("RGB"))
    return Film(tuple(frames), len(frames) / milliseconds * 1000 if milliseconds > 0 else None)


def _video(path: Path, container: str, most: int) -> Film:
    try:
        import av
    except ImportError:
        raise MissingExtra(
            f"{quoted(path.name)} is a video file, and reading it takes av: pip install 'affectlens[media]'; "
            "or give its frames: a folder or list of pictures"
        ) from None
    try:
        # The container is named: of a playlist, ffmpeg would open what it lists.
        with open(path, "rb") as stream, av.open(stream, format=container) as opened:
            return _decoded(opened, most)
    except TaskError as error:
        raise TaskError(f"{quoted(str(path))}: {error}") from None
    except Exception:
        raise TaskError(f"{quoted(str(path))}: this film can't be read") from None


def _decoded(opened: Any, most: int) -> Film:
    """Frames at even distances, found in two passes: a header may say any number of them."""
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
            raise TaskError(f"more than {_LONGEST:,} frames")
        if frame.width * frame.height > (Image.MAX_IMAGE_PIXELS or 0):
            raise TaskError(f"a picture of more than {Image.MAX_IMAGE_PIXELS:,} pixels is not opened")
        yield frame
