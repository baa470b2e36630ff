"""Open films: a folder or list of frame pictures, an animated GIF, WebP or PNG, or a video file.

Of a long film, frames at even distances are taken, with the first and the last, turned as players show them.
Pillow reads animations; MP4, WebM and AVI need the `av` package (the extra `media`).
"""

import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from affectlens.errors import TaskError, quoted
from affectlens.tasks.containers import container_of, opened_container
from affectlens.tasks.pictures import as_seen, decoding, open_picture

FRAMES = 32  # of a film that a model is shown by default, at most
_LONGEST = 100_000  # frames of a film, or files of its folder
_PIXELS = 10_000_000_000  # of all frames of an animation: each is decoded to reach the next
_PICTURE = re.compile(r".+\.(?:png|jpe?g|webp|gif|bmp|tiff?|ppm)", re.IGNORECASE)
# The upper left 2 × 2 of a display matrix, by signs → what turns a stored frame as players show it. A stored
# point (x, y), y downwards, is shown at (a·x + c·y, b·x + d·y).
_TURNS: Mapping[tuple[int, ...], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Film:
    """The frames of a film that a model is shown, all of one size, and their number per second."""

    frames: tuple[Image.Image, ...]
    fps: float | None = None  # None for pictures, which have no clock
    sound: bool = False  # whether the file has a sound track; `open_sound` opens it


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
    container = container_of(source, "film")
    if container is not None:
        with opened_container(source, container, what="film") as opened:
            return _decoded(opened, most)
    with decoding(source, "film") as image:
        return _animation(image, most)


def _animation(image: Image.Image, most: int) -> Film:
    count = getattr(image, "n_frames", 1)
    if count > _LONGEST or count * image.width * image.height > _PIXELS:
        raise TaskError(
            f"{count:,} frames of {image.width} × {image.height} pixels; the limits are "
            f"{_LONGEST:,} frames and {_PIXELS:,} pixels in all"
        )
    wanted, frames, milliseconds = set(even(count, most)), [], 0.0
    for number in range(count):
        image.seek(number)
        image.load()  # some formats know the duration of a frame only once it is loaded
        milliseconds += float(image.info.get("duration", 0))
        if number in wanted:
            frames.append(as_seen(image))
    return Film(tuple(frames), len(frames) / milliseconds * 1000 if milliseconds > 0 else None)


def _decoded(opened: Any, most: int) -> Film:
    """Decode in two passes, the first to count the frames: a header may state any number."""
    if not opened.streams.video:
        raise TaskError("this file has no pictures; give it as a sound (audio)")
    stream = opened.streams.video[0]
    count = sum(1 for _ in _bounded(opened.decode(stream)))
    if not count:
        raise TaskError("this film has no frames")
    opened.seek(0)
    wanted = set(even(count, most))
    frames = [
        _upright(frame) for number, frame in enumerate(_bounded(opened.decode(stream))) if number in wanted
    ]
    rate = float(stream.average_rate or 0)
    return Film(tuple(frames), len(frames) * rate / count if rate > 0 else None, bool(opened.streams.audio))


def _upright(frame: Any) -> Image.Image:
    """Return a frame as players show it: a phone stores films as its sensor lies, and how to turn them.

    Raises `TaskError` for a turn that is no multiple of 90°.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    image: Image.Image = frame.to_image().convert("RGB")
    if matrix is None:
        return image
    # Three rows of three numbers in fixed point; only the ratios of the first four matter.
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    largest = max(map(abs, (a, b, c, d))) or 1
    way = tuple(round(number / largest, 2) for number in (a, b, c, d))
    if way not in _TURNS:
        raise TaskError(
            "its display matrix turns or stretches this film by other than 90°; re-encode it, for example "
            "with ffmpeg -i FILM OUT.mp4"
        )
    turn = _TURNS[way]
    return image if turn is None else image.transpose(turn)


def _bounded(frames: Iterator[Any]) -> Iterator[Any]:
    for number, frame in enumerate(frames):
        if number >= _LONGEST:
            raise TaskError(f"this film has more than {_LONGEST:,} frames")
        if frame.width * frame.height > (Image.MAX_IMAGE_PIXELS or 0):
            raise TaskError(f"a frame has more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        yield frame
