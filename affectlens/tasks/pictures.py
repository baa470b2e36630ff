"""Open pictures, whole files or one out of a sheet by a W3C media fragment (`#xywh=x,y,w,h`)."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from PIL import Image

from affectlens.errors import TaskError, quoted
from affectlens.tasks.opening import ordinary

_FRAGMENT = re.compile(r"^(?P<file>.+)#xywh=(?P<x>\d{1,9}),(?P<y>\d{1,9}),(?P<w>\d{1,9}),(?P<h>\d{1,9})$")
# Formats of pictures alone: Pillow would run Ghostscript on an EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LARGEST = 500_000_000  # bytes


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
    path = ordinary(file, what, most=_LARGEST)
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
