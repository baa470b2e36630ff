"""What all interventions share: the selection they are given, and the new values they make of it.

sites or points, in any form ── selected ──▶ Sites or Points     once, when the intervention is made
Sites ── Edits ──▶ {site: new values}                            one site at a time, when it is looked up
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.bytes import Span
from affectlens.errors import LensError, NoSuchSite
from affectlens.sites import Point, Points, Site, Sites

Places = Site | Point | Iterable[Site] | Iterable[Point]


def selected(places: Places) -> Sites | Points:
    """Return a selection of sites or of points. Raises `NoSuchSite` if it is empty, or mixes the two.

    Interventions keep this and not what they were given: an iterator would be empty the second time, and
    the intervention would silently change nothing.
    """
    if isinstance(places, Sites | Points) and len(places):
        return places
    found = [places] if isinstance(places, Site | Point) else list(places)
    if not found:
        raise NoSuchSite("an empty selection would change nothing; select at least one site or point")
    sites = [place for place in found if isinstance(place, Site)]
    points = [place for place in found if isinstance(place, Point)]
    if len(sites) == len(found):
        return Sites(sites)
    if len(points) == len(found):
        return Points(points)
    kinds = ", ".join(sorted({type(place).__name__ for place in found}))
    raise NoSuchSite(f"an intervention takes either sites or points, got {kinds}")


def only_sites(places: Places, what: str) -> Sites:
    """Return a selection of sites; raise `NoSuchSite` for points, since `what` changes weights."""
    found = selected(places)
    if isinstance(found, Sites):
        return found
    raise NoSuchSite(f"{what} changes weights and takes sites, got the point {found[0]}")


def only_points(places: Places, what: str) -> Points:
    """Return a selection of points; raise `NoSuchSite` for sites, since `what` changes activations."""
    found = selected(places)
    if isinstance(found, Points):
        return found
    raise NoSuchSite(
        f"{what} changes activations and takes points such as sites.at('output'), got the site {found[0]}"
    )


def sites_of(places: Sites | Points) -> Sites:
    """Return a selection of sites as it is; for points, an empty one."""
    return places if isinstance(places, Sites) else Sites(())


def points_of(places: Sites | Points) -> Points:
    """Return a selection of points as it is; for sites, an empty one."""
    return places if isinstance(places, Points) else Points(())


def set_fields(intervention: object, **values: object) -> None:
    """Set the fields of a frozen intervention, from its own `__init__`."""
    for name, value in values.items():
        object.__setattr__(intervention, name, value)


def finite(what: str, value: float) -> float:
    """Return a factor; raise `LensError` if it is NaN, infinite or no number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise LensError(f"{what} must be finite, got {value}")
    return value


@runtime_checkable
class Edit(Protocol):
    """A function that makes the new values of a site, or of some of its rows."""

    def __call__(self, site: Site, wanted: slice | None = None) -> Tensor:
        """Return values in the site's shape and order of rows."""
        ...


class Edits(Mapping[Site, Tensor]):
    """New values by site, made when they are looked up, so that memory holds one site and not a model.

    `rowwise` says that `edit` can make some rows without the others: a writer then holds a block of rows.
    `stored` says in which file the new values of a site are stored, if they are: a writer then copies bytes.
    """

    def __init__(
        self,
        sites: Sites,
        edit: Edit,
        *,
        rowwise: bool = True,
        stored: Callable[[Site], Span | None] = lambda _: None,
    ) -> None:
        self.sites, self.edit, self.rowwise, self.stored = sites, edit, rowwise, stored
        self._known = frozenset(sites)

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self._known:
            raise KeyError(site)
        return self.edit(site)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def elementwise(live: Checkpoint, function: Callable[[Tensor], Tensor]) -> Edit:
    """Return the edit that applies a function to the live values, each by itself."""

    def edit(site: Site, wanted: slice | None = None) -> Tensor:
        return function(live.read(site, wanted))

    return edit
