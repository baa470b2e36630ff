"""Open pictures as people see them, as RGB with 8 bits per channel.

A picture is turned as its EXIF block says, lies on white where it is transparent, and keeps its brightness
where it has more than 8 bits. It is a whole file, or one picture of a sheet, given by a W3C media fragment
(`#xywh=x,y,w,h`).
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from affectlens.errors import TaskError, quoted, warn
from affectlens.tasks.media import ordinary

_FRAGMENT = re.compile(r"^(?P<file>.+)#xywh=(?P<x>\d{1,9}),(?P<y>\d{1,9}),(?P<w>\d{1,9}),(?P<h>\d{1,9})$")
# Without EPS, on which Pillow would run Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LARGEST = 500_000_000  # bytes
# EXIF's number for each way to lay a picture → what makes it upright.
_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def open_picture(source: str | Image.Image) -> Image.Image:
    """Open a picture as people see it, as RGB: a file, the part `#xywh=x,y,w,h` of one, or one in memory.

    EXIF orientation is applied, transparency lies on white, and 16 bits and floating-point numbers (0…1 or
    0…255) become 8 bits. Of an animation it is the first frame, with a `Remark`.

    Raises `TaskError` for a picture that is missing, broken or too large, lies outside its sheet, or has
    numbers of no known range.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Image.new("L", (64, 32)).save(f"{folder}/sheet.png")
    ...     open_picture(f"{folder}/sheet.png#xywh=32,0,32,32").size
    (32, 32)
    """
    if isinstance(source, Image.Image):
        return _in_memory(source)
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


def _in_memory(picture: Image.Image) -> Image.Image:
    try:
        return as_seen(picture)
    except TaskError:
        raise
    except Exception:  # its file is read only now
        raise TaskError(f"a picture of {picture.width} × {picture.height} pixels can't be read") from None


def _opened(file: str) -> Image.Image:
    with decoding(file) as image:
        # A camera's MPO is a JPEG with smaller copies behind it, which no viewer shows.
        several = getattr(image, "is_animated", False) and image.format != "MPO"
        seen = as_seen(image)
    if several:
        warn(f"{quoted(file)} has several frames, of which the first is used; as `video` all are")
    return seen


@contextmanager
def decoding(file: str, what: str = "picture") -> Iterator[Image.Image]:
    """Open a picture inside a block. Raises `TaskError`, also where decoding in the block fails."""
    path = ordinary(file, what, most=_LARGEST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a broken file holds beside its pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # By a stream: of a name, Pillow maps a TIFF that lies on its side with width and height swapped.
            with open(path, "rb") as stream, Image.open(stream, formats=_FORMATS) as image:
                yield image
    except TaskError as error:
        raise TaskError(f"{quoted(file)}: {error}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise TaskError(f"{quoted(file)}: this {what} has more than {most} pixels") from None
    except Exception:  # each decoder raises errors of its own
        raise TaskError(f"{quoted(file)}: this {what} can't be read") from None


def as_seen(image: Image.Image) -> Image.Image:
    """Return an open picture, or the current frame of one, as a viewer shows it; as RGB.

    Raises `TaskError`, without the file's name, for numbers of no known range.
    """
    image.load()  # a PNG may state its orientation behind its pixels
    seen = _toned(image) if image.mode.startswith(("I", "F")) else image
    if seen.has_transparency_data:
        # Hidden pixels have any colour, most often black, so the colours alone are another picture.
        white = Image.new("RGBA", seen.size, "white")
        seen = Image.alpha_composite(white, seen.convert("RGBA"))
    turn = _UPRIGHT.get(_orientation(image))
    upright = seen if turn is None else seen.transpose(turn)
    return upright.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # viewers show a picture whose EXIF block is broken, as it lies
        return None


def _toned(image: Image.Image) -> Image.Image:
    """Return a picture of one channel with more than 8 bits in 8 bits. Raises `TaskError`."""
    values = np.asarray(image, dtype=np.float32)
    most = _brightest(image, values)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = most - values
    clear = image.info.get("transparency")  # of a PNG: the one value that is transparent
    if isinstance(clear, int):
        values = np.where(values == clear, most, values)
    return Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))


def _brightest(image: Image.Image, values: np.ndarray) -> float:
    """Return the value of white. Raises `TaskError` where neither the format nor the values tell it."""
    if image.mode.startswith("I;"):  # 16 bits, of which a TIFF may use fewer
        return 2.0 ** int(_tag(image, _BITS) or 16) - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 2.0**16 - 1
    if image.mode == "F" and values.size and values.min() >= 0 and values.max() <= 255:
        return 1.0 if values.max() <= 1 else 255.0
    kind = "floating-point numbers" if image.mode == "F" else "integers"
    raise TaskError(
        f"a picture of {kind} from {values.min():g} to {values.max():g}, and which number is white is not "
        f"known; save it with 8 or 16 bits, or as floating-point numbers from 0 to 1"
    )


def _tag(image: Image.Image, number: int) -> Any:
    """Return the value of a tag of a TIFF; None for other formats."""
    found = getattr(image, "tag_v2", {}).get(number)
    return found[0] if isinstance(found, tuple) and found else found
