"""Open pictures, whole files or one out of a sheet by a W3C media fragment (`#xywh=x,y,w,h`)."""

import re
import stat
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image

from affectlens.errors import TaskError, quoted

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
    try:
        state = Path(file).stat()
    except (OSError, ValueError):
        raise TaskError(f"{quoted(file)}: there is no such picture") from None
    if not stat.S_ISREG(state.st_mode):
        raise TaskError(f"{quoted(file)}: this is not an ordinary file")  # a pipe or device would never end
    if state.st_size > _LARGEST:
        raise TaskError(f"{quoted(file)}: larger than {_LARGEST:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as image:
                return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise TaskError(f"{quoted(file)}: a picture of more than {most} pixels is not opened") from None
    except Exception:  # each format has its own ways of being broken
        raise TaskError(f"{quoted(file)}: this picture can't be read") from None
