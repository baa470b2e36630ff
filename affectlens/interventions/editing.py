"""Edits: what an intervention makes of sites, computed one at a time when asked for."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.bytes import Span
from affectlens.sites import Site, Sites


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


def elementwise(live: Checkpoint, function: Callable[[Tensor], Tensor]) -> Edit:
    """The edit that makes of each value what a function makes of it alone."""

    def edit(site: Site, wanted: slice | None = None) -> Tensor:
        return function(live.read(site, wanted))

    return edit
