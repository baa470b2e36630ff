"""Input and output embedding where one side stores a single matrix for both, and the other side stores two.

transformers uses one matrix for both if the config ties them and a file holds one of them, or two equal ones.
If a file holds two that differ, each is used as it is, whatever the config says. So a side with one matrix is
compared under both names with a side that has two.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.sites import Site, Sites
from affectlens.sites.locating import in_order

VOCABULARY = ("embed_tokens", "lm_head")
_ROWS = 4096  # compared at a time


class Twins(NamedTuple):
    """The embeddings that one side alone stores.

    `rows` has both sides as they are used, for each site that can be compared; `copies` are sites whose
    values are those of the other embedding, which is compared already.
    """

    rows: dict[Site, tuple[Checkpoint, Checkpoint]]
    copies: Sites


def twins(base: Checkpoint, tuned: Checkpoint) -> Twins:
    """Find the embeddings that one side stores and the other side ties to its other embedding."""
    rows: dict[Site, tuple[Checkpoint, Checkpoint]] = {}
    copies: list[Site] = []
    for site in _lone(base, tuned):
        holder, other = (base, tuned) if site in base.storage else (tuned, base)
        view = sharing(other, site)
        if view is None:
            continue
        if not _single(holder, site):
            rows[site] = (holder, view) if holder is base else (view, holder)
        elif _twin(holder, site) is None and site.role == "embed_tokens":
            # Each side stores its one matrix under another name: it is compared once.
            rows[site] = (holder, view) if holder is base else (view, holder)
        else:
            copies.append(site)
    return Twins(rows, Sites(copies))


def sharing(side: Checkpoint, site: Site) -> Checkpoint | None:
    """Return a view of `side` that also has `site`, an embedding that it ties to its other one; else None."""
    twin = _twin(side, site)
    if twin is None or site in side.storage or not side.ties:
        return None
    view = copy.copy(side)
    view.storage = in_order({**side.storage, site: side.storage[twin]})
    view.sites = Sites(view.storage)
    return view


def _lone(base: Checkpoint, tuned: Checkpoint) -> Iterator[Site]:
    for one, other in ((base, tuned), (tuned, base)):
        for site in one.storage:
            if site.role in VOCABULARY and site.param == "weight" and site not in other.storage:
                yield site


def _twin(side: Checkpoint, site: Site) -> Site | None:
    """Return the other embedding of the site's tower, if the side stores it."""
    other = next(role for role in VOCABULARY if role != site.role)
    found = (s for s in side.storage if (s.role, s.tower, s.param) == (other, site.tower, site.param))
    return next(found, None)


def _single(side: Checkpoint, site: Site) -> bool:
    """Return whether a side that stores an embedding uses one matrix for both."""
    twin = _twin(side, site)
    return side.ties and (twin is None or _equal(side, site, twin))


def _equal(side: Checkpoint, one: Site, two: Site) -> bool:
    from affectlens.checkpoints.slicing import same_bits

    if side.shape(one) != side.shape(two):
        return False
    starts = range(0, side.shape(one)[0], _ROWS)
    wanted = (slice(start, start + _ROWS) for start in starts)
    return all(same_bits(side.read(one, rows), side.read(two, rows)) for rows in wanted)
