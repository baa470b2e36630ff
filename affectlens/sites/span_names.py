"""Read the name of a span: a medium, one item of it, a tile or frame of that, or a word of the text."""

import re
from typing import NamedTuple

from affectlens.errors import NoSuchSite, near

SPANS = ("image", "audio", "video", "text", "prompt", "last", "generated")
_PARTS = {"image": "tile", "video": "frame"}
_ITEM = re.compile(r"(image|audio|video):([1-9]\d*)(?:/(tile|frame):([1-9]\d*))?")
_EXAMPLES = ("image:2", "image:2/tile:1", "video:1/frame:3", "audio:1", "text:word")
KNOWN = ("token numbers", *SPANS, *_EXAMPLES)  # as errors list them


class SpanName(NamedTuple):
    """A span by its parts; numbers count from 1, and 0 stands for all."""

    kind: str  # one of SPANS
    number: int = 0
    part: int = 0
    word: str = ""


def span_name(span: str) -> SpanName:
    """Read a span. Raises `NoSuchSite` for a name that is none.

    >>> span_name("image:2/tile:1")
    SpanName(kind='image', number=2, part=1, word='')
    >>> span_name("text:sad").word
    'sad'
    """
    if span in SPANS:
        return SpanName(span)
    item = _ITEM.fullmatch(span)
    if item and item[3] in (None, _PARTS.get(item[1])):
        return SpanName(item[1], int(item[2]), int(item[4] or 0))
    word = span.removeprefix("text:")
    if word != span and word.strip():
        return SpanName("text", word=word.strip())
    raise NoSuchSite(f"no span {span!r}. Spans: {near(span, KNOWN)}")
