"""Points: places in a forward pass, given by a site, the kind of activation, and token positions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import overload

from affectlens.errors import NoSuchSite, WrongCount, near
from affectlens.sites.site import Site
from affectlens.sites.span_names import KNOWN, span_name

# `Sites.at` explains each kind and span.
KINDS = ("output", "input", "pre_activation", "gated", "heads", "residual")
Span = str | int | tuple[int, ...] | None


def numbered(span: object) -> Span:
    """Convert whole numbers of any type (numpy, torch) to int; keep a name. Raises `NoSuchSite` otherwise."""
    if span is None or isinstance(span, str):
        return span
    try:
        return tuple(map(index, span)) if isinstance(span, Iterable) else index(span)  # type: ignore[arg-type]
    except TypeError:
        raise NoSuchSite(f"no span {span!r}. Spans: {', '.join(KNOWN)}") from None


@dataclass(frozen=True)
class Point:
    """A place in a forward pass: an activation at a site, at some token positions (None: at all).

    >>> Point(Site("language", "gate_proj", layer=12), "gated", "image")
    language.12.gate_proj@gated[image]
    """

    site: Site
    kind: str = "output"
    span: Span = None

    def __repr__(self) -> str:
        where = "" if self.span is None else f"[{self.span}]"
        return f"{self.site!r}@{self.kind}{where}"


class Points(Sequence[Point]):
    """An ordered set of points, made by `Sites.at`. Raises `NoSuchSite` for an unknown kind or span.

    >>> gates = Points([Point(Site("language", "gate_proj", layer=n), "pre_activation") for n in range(2)])
    >>> gates.expect(2)
    Points(2: language.0.gate_proj@pre_activation, language.1.gate_proj@pre_activation)
    """

    def __init__(self, points: Iterable[Point]) -> None:
        self._points = tuple(dict.fromkeys(points))
        for point in self._points:
            if point.kind not in KINDS:
                raise NoSuchSite(f"no point {point.kind!r}. Points: {near(point.kind, KINDS)}")
            if isinstance(point.span, str):
                span_name(point.span)  # raises for an unknown one

    def expect(self, count: int) -> "Points":
        """Return the selection if it has `count` points; raise `WrongCount` if not."""
        if len(self) != count:
            raise WrongCount(f"expected {count} points, got {len(self)}: {self!r}")
        return self

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> "Points": ...
    def __getitem__(self, index: int | slice) -> "Point | Points":
        found = self._points[index]
        return found if isinstance(found, Point) else Points(found)

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points)

    def __or__(self, other: Iterable[Point]) -> "Points":
        return Points((*self._points, *other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Points) and self._points == other._points

    def __hash__(self) -> int:
        return hash(self._points)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self._points[:3])) + (", …" if len(self) > 3 else "")
        return f"Points({len(self)}: {shown})"
