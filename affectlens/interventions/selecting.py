"""What an intervention is given as sites, as a selection that can be used more than once."""

from collections.abc import Iterable

from affectlens.errors import NoSuchSite
from affectlens.sites import Site, Sites


def selected(sites: Site | Iterable[Site]) -> Sites:
    """Make a site or any iterable of sites a selection; raises `NoSuchSite` for none.

    An iterator would be empty the second time, and the intervention silently do nothing.
    """
    found = Sites([sites] if isinstance(sites, Site) else sites)
    if not found:
        raise NoSuchSite("an intervention on no site would change nothing; select some sites")
    return found
