"""Edits: what an intervention makes of sites, computed one at a time when asked for."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.bytes import Span
from affectlens.errors import LensError, NoSuchSite
from affectlens.sites import Point, Points, Site, Sites

Places = Site | Point | Iterable[Site] | Iterable[Point]


@runtime_checkable
class Edit(Protocol):
    """The new values of a site, or of some of its rows."""

    def __call__(self, site: Site, wanted: slice | None = None) -> Tensor:
        """Shape and order of rows as the site's."""
        ...


class Edits(Mapping[Site, Tensor]):
    """New values by site, made when they are looked up: of a whole model only one site is in memory.

    `rowwise` says that rows can be had without the others, so that a writer need not hold even one site.
    `lying` says where the new bytes of a site lie already, if they do: they need not be read to be copied.
    """

    def __init__(
        self,
        sites: Sites,
        edit: Edit,
        *,
        rowwise: bool = True,
        lying: Callable[[Site], Span | None] = lambda _: None,
    ) -> None:
        self.sites, self.edit, self.rowwise, self.lying = sites, edit, rowwise, lying
        self._known = frozenset(sites)

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self._known:
            raise KeyError(site)
        return self.edit(site)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def keep(intervention: object, **values: object) -> None:
    """Set the fields of a frozen intervention, from its own `__init__`."""
    for name, value in values.items():
        object.__setattr__(intervention, name, value)


def elementwise(live: Checkpoint, function: Callable[[Tensor], Tensor]) -> Edit:
    """The edit that makes of each value what a function makes of it alone."""

    def edit(site: Site, wanted: slice | None = None) -> Tensor:
        return function(live.read(site, wanted))

    return edit


def finite(what: str, value: float) -> float:
    """Raise `LensError` for a factor that is no number: everything it touches would be none either."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise LensError(f"{what} is {value}, which is no number that weights or activations could be given")
    return value


def selected(places: Places) -> Sites | Points:
    """Make what was given a selection: of sites, or of points. Raises `NoSuchSite` for none, or for both.

    An iterator would be empty the second time, and the intervention silently do nothing.
    """
    if isinstance(places, Sites | Points) and len(places):
        return places
    found = [places] if isinstance(places, Site | Point) else list(places)
    if not found:
        raise NoSuchSite("an intervention on no site would change nothing; select some sites")
    sites = [place for place in found if isinstance(place, Site)]
    points = [place for place in found if isinstance(place, Point)]
    if len(sites) == len(found):
        return Sites(sites)
    if len(points) == len(found):
        return Points(points)
    raise NoSuchSite("an intervention takes sites or points, all of one kind")


def sites_of(places: Sites | Points) -> Sites:
    """Return the sites of a selection of sites; none of a selection of points."""
    return places if isinstance(places, Sites) else Sites(())


def points_of(places: Sites | Points) -> Points:
    """Return the points of a selection of points; none of a selection of sites."""
    return places if isinstance(places, Points) else Points(())


def only_sites(places: Places, what: str) -> Sites:
    """Sites alone; raises `NoSuchSite` for points, whose activations `what` does not change."""
    found = selected(places)
    if isinstance(found, Sites):
        return found
    raise NoSuchSite(f"{what} changes weights, so it takes sites; {found[0]} is an activation")


def only_points(places: Places, what: str) -> Points:
    """Points alone; raises `NoSuchSite` for sites, whose weights `what` does not change."""
    found = selected(places)
    if isinstance(found, Points):
        return found
    raise NoSuchSite(f"{what} changes activations, so it takes points: sites.at('output'), not {found[0]}")
