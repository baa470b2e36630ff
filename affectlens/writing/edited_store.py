"""A store with edits in it, which makes an edited tensor when it is read, some rows at a time.

    Store ── edits ──▶ EditedStore ── edits ──▶ EditedStore …      each sees the values that the last one left

Names, shapes and dtypes are those of the store below, so that a checkpoint addresses both alike.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from affectlens.checkpoints import Checkpoint, Header
from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.slicing import put, rows, take
from affectlens.errors import LensError
from affectlens.interventions.edits import Edits
from affectlens.sites import Site, Sites, Storage


class EditedStore:
    """Serve the edited sites of a checkpoint, cast to the stored dtype, and the rest as stored."""

    def __init__(self, live: Checkpoint, edits: Mapping[Site, Tensor]) -> None:
        self.inner = live.store
        self.name, self.source, self.format = self.inner.name, self.inner.source, self.inner.format
        self.config, self.notes = self.inner.config, self.inner.notes
        self.skipped, self.aliases = self.inner.skipped, self.inner.aliases
        self.headers: Mapping[str, Header] = self.inner.headers
        if not isinstance(edits, Edits):  # an intervention of the user's may return a plain mapping
            edits = Edits(Sites(edits), partial(_looked_up, edits), rowwise=False)
        self._edits = edits
        self._sites: dict[str, dict[Site, Storage]] = {}
        for site in edits:
            where = live.at(site)
            self._sites.setdefault(where.tensor, {})[site] = where

    def read(self, tensor: str, wanted: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, with the edits in it."""
        sites = self._sites.get(tensor)
        if sites is None:
            return self.inner.read(tensor, wanted)
        if not self.by_rows(tensor):
            found = self.inner.read(tensor).clone()
            for site, where in sites.items():
                _lay(found, where, self._value(site, where, None))
            return found if wanted is None else found[wanted]
        first, last, _ = (wanted or slice(None)).indices(self.headers[tensor].shape[0])
        (site, where), *others = sites.items()
        if not others and where.cut is None and where.expert is None:
            # The site is the whole tensor, so the old values need not be read.
            return self._value(site, where, slice(first, last))
        found = self.inner.read(tensor, slice(first, last)).clone()
        for site, where in sites.items():
            self._some(found, site, where, first=first)
        return found

    def by_rows(self, tensor: str) -> bool:
        """Return whether some rows can be made without the others."""
        places = self._sites.get(tensor, {}).values()
        here = all(_by_rows(where, rowwise=self._edits.rowwise) for where in places)
        return here and self.inner.by_rows(tensor)

    def origin(self, tensor: str) -> Span | None:
        """Return where the opened files keep a tensor, below all edits."""
        return self.inner.origin(tensor)

    def span(self, tensor: str) -> Span | None:
        """Return where the values of a tensor are stored: as they were, or in a donor; None for new ones."""
        sites = self._sites.get(tensor)
        if sites is None:
            return self.inner.span(tensor)
        (site, where), *others = sites.items()
        part = where.expert is not None or where.cut is not None or where.unit is not None
        return None if others or part or where.transposed else self._edits.stored(site)

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        self.inner.check()

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies the content of the store below, without the edits."""
        return self.inner.facts

    def _some(self, found: Tensor, site: Site, where: Storage, *, first: int) -> None:
        """Write a site's values into rows of its tensor, from row `first` on."""
        last = first + len(found)
        if where.expert is not None:  # a row is an expert
            if first <= where.expert < last:
                value = self._value(site, where, None)
                _lay(found, where._replace(expert=where.expert - first), value)
            return
        start, stop = (where.cut.start, where.cut.stop) if where.cut else (0, where.shape[0])
        low, high = max(first, start), min(last, stop)
        if low < high:
            found[low - first : high - first] = self._value(site, where, slice(low - start, high - start))

    def _value(self, site: Site, where: Storage, wanted: slice | None) -> Tensor:
        """Return new values of a site in the stored dtype; raise `LensError` for another shape."""
        value = self._edits.edit(site, wanted)
        expected = where.shape if wanted is None else (wanted.stop - wanted.start, *where.shape[1:])
        if tuple(value.shape) != expected:
            raise LensError(f"{site} has shape {expected}, but its new values have {tuple(value.shape)}")
        return value.detach().to(device="cpu", dtype=getattr(torch, self.headers[where.tensor].dtype))


def _looked_up(values: Mapping[Site, Tensor], site: Site, wanted: slice | None = None) -> Tensor:
    return values[site] if wanted is None else values[site][wanted]


def _by_rows(where: Storage, *, rowwise: bool) -> bool:
    """Return whether rows of the stored tensor are rows, or experts, of the site."""
    if where.expert is not None:
        return True
    laid_out = where.unit is None and not where.transposed and bool(where.shape)
    return rowwise and laid_out and (where.cut is None or (where.cut.dim == 0 and where.cut.period is None))


def _lay(stored: Tensor, where: Storage, value: Tensor) -> None:
    """Write a site's values into its tensor, in place."""
    run = rows(where)
    place = take(stored if run is None else stored[run], where)
    if place.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr():
        place.copy_(value)  # a view: `put` would copy the whole matrix for each of its neurons
    else:
        put(stored, where, value=value)
