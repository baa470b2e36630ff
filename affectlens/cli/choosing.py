"""Which sites a command line means."""

import re
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from affectlens.sites import Sites

_RANGE = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", re.ASCII)


def some(sites: "Sites", roles: list[str] | None, towers: list[str] | None, layers: str | None) -> "Sites":
    """The same; raises a usage error where nothing is asked, and so all of the model would be meant."""
    if roles is None and towers is None and layers is None:
        raise typer.BadParameter("say which sites: --role, --tower or --layers")
    return chosen(sites, roles, towers, layers)


def chosen(sites: "Sites", roles: list[str] | None, towers: list[str] | None, layers: str | None) -> "Sites":
    """The sites of these roles, towers and layers; all where nothing is asked.

    Raises `NoSuchSite` for what is not there, and a usage error for what is no list of layers.
    """
    from affectlens.errors import NoSuchSite
    from affectlens.sites import layers as spans

    found = sites.where(role=_listed(roles), tower=_listed(towers))
    if layers is None:
        return found
    wanted = numbers(layers)
    lost = sorted(wanted - {site.layer for site in found})
    if lost:
        raise NoSuchSite(f"no site has layer={lost[0]}. Layers here: {spans(found)}")
    return found.where(layer=wanted)


def numbers(layers: str) -> set[int]:
    """Read numbers and ranges whose ends count; raises a usage error.

    >>> sorted(numbers("2-4,7"))
    [2, 3, 4, 7]
    """
    found: set[int] = set()
    for part in layers.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise typer.BadParameter(
                f"{layers!r} is no list of layers, such as 10-19,23", param_hint="--layers"
            )
        found |= set(range(first, last + 1))
    return found


def _listed(words: list[str] | None) -> list[str] | str | None:
    """Options that are repeated, or hold several between commas; one alone is told by itself in an error."""
    found = [word.strip() for one in words or () for word in one.split(",")]
    return found[0] if len(found) == 1 else found or None
