"""Open pictures, whole files or one out of a sheet by a W3C media fragment (`#xywh=x,y,w,h`)."""

import re
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from affectlens.errors import TaskError

_FRAGMENT = re.compile(r"^(?P<file>.+)#xywh=(?P<x>\d+),(?P<y>\d+),(?P<w>\d+),(?P<h>\d+)$")


def open_picture(source: str) -> Image.Image:
    """Open a picture as RGB; raises `TaskError` for a missing, unreadable or out-of-sheet one."""
    match = _FRAGMENT.match(source)
    if match is None:
        return _sheet(source)
    x, y, w, h = (int(match[name]) for name in "xywh")
    sheet = _sheet(match["file"])
    if not (w and h and x + w <= sheet.width and y + h <= sheet.height):
        raise TaskError(f"{source}: the sheet is only {sheet.width} × {sheet.height} pixels")
    return sheet.crop((x, y, x + w, y + h))


@lru_cache(maxsize=32)
def _sheet(file: str) -> Image.Image:
    if not Path(file).is_file():
        raise TaskError(f"{file}: there is no such picture")
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        raise TaskError(f"{file}: this picture can't be read") from None
