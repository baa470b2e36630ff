"""What an intervention is given as sites or points, as a selection that can be used more than once."""

import math
from collections.abc import Iterable

from affectlens.errors import LensError, NoSuchSite
from affectlens.sites import Point, Points, Site, Sites

Places = Site | Point | Iterable[Site] | Iterable[Point]


def finite(what: str, value: float) -> None:
    """Raise `LensError` for a factor that is no number: everything it touches would be none either."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise LensError(f"{what} is {value}, which is no number that weights or activations could be given")


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
