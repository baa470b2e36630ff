"""Transplant: put a donor's weights in at some sites, and say what of the donor does not come with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint, pair
from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.memory import shared
from affectlens.checkpoints.settings import differing
from affectlens.checkpoints.tying import VOCABULARY
from affectlens.checkpoints.vocabulary import Rows, compare_words
from affectlens.errors import LensError
from affectlens.interventions.edits import Edits, Places, finite, only_sites, set_fields
from affectlens.lens import Live
from affectlens.lens.live import as_donor
from affectlens.sites import Site, Sites


@dataclass(frozen=True)
class Transplant:
    """Give sites the donor's weights: W + alpha · (W_donor − W).

    From tuned into base, it asks whether the change at these sites is sufficient (arXiv 2302.06600). From
    base into tuned, it reverts the change and asks whether it is necessary. `alpha` 0 and 1 copy, exact to
    the bit; other values interpolate or amplify, computed in float32. The donor is a path, hub id,
    `Checkpoint`, module or lens, such as `lens.without_adapter()`. Raises `LensError` for an `alpha` that is
    not finite and, when it is applied, `NoSuchSite` where the donor lacks a site and `LensError` where its
    shape differs.

    Where the two tokenizers give the same tokens other numbers, rows of embeddings are matched by token.

    >>> import affectlens as al
    >>> base, tuned, *_ = al.load_demo()
    >>> gates = base.sites.where(tower="language", role="gate_proj")
    >>> edits = al.Transplant(gates, donor=tuned).edits(base)
    >>> all(edits[gate].equal(tuned.read(gate)) for gate in gates)
    True
    """

    sites: Sites
    donor: Source | Live
    alpha: float

    def __init__(self, sites: Places, *, donor: Source | Live, alpha: float = 1.0) -> None:
        set_fields(self, sites=only_sites(sites, "Transplant"), donor=donor, alpha=finite("alpha", alpha))

    def __repr__(self) -> str:
        donor = self.donor.store.name if isinstance(self.donor, Checkpoint) else self.donor
        named = donor if isinstance(donor, str | Path) else type(donor).__name__
        return f"Transplant({self.sites!r}, donor={str(named)!r}, alpha={self.alpha:g})"

    def edits(self, live: Checkpoint) -> Edits:
        """Return the donor's values, mixed with the live ones by `alpha`."""
        donor = fitting_donor(self.donor, live, sites=self.sites)

        words = any(site.role in VOCABULARY for site in self.sites)
        matched = pair(live, donor).matched if words else {}

        def by_token(site: Site, rows: tuple[Rows, Rows]) -> Tensor:
            """Return the donor's rows in the order of the live tokens; tokens it lacks keep theirs."""
            here, there = (torch.from_numpy(side) for side in rows)
            theirs = donor.read(site)
            found = live.read(site).to(device=theirs.device, dtype=theirs.dtype, copy=True)
            found[here] = theirs[there]
            return found

        def edit(site: Site, wanted: slice | None = None) -> Tensor:
            if self.alpha == 0:
                return live.read(site, wanted)
            rows = matched.get(site.at())
            there = donor.read(site, wanted) if rows is None else by_token(site, rows)[wanted or ...]
            return there if self.alpha == 1 else _mixed(live.read(site, wanted), there, alpha=self.alpha)

        def stored(site: Site) -> Span | None:
            copied = self.alpha == 1 and site.at() not in {*matched, *donor.factors}
            return donor.span(site) if copied and donor.dtype(site) == live.dtype(site) else None

        return Edits(self.sites, edit, stored=stored)

    def remarks(self, lens: Live) -> Sequence[str]:
        """Return sentences on what of the donor does not come with its weights at these sites."""
        return left_behind(lens, self.donor, sites=self.sites) if self.alpha else ()


def fitting_donor(donor: Source | Live, live: Checkpoint, *, sites: Sites) -> Checkpoint:
    """Open a donor, an adapter over the weights as they were before any intervention.

    Raises `NoSuchSite` where it lacks a site, and `LensError` where its shape there differs.
    """
    found = open_checkpoint(as_donor(donor), base=live.untouched)
    if shared(found.store, live.store):
        found = found.untouched  # the donor is the live model: its own values are those before any edit
    for site in sites:
        if found.shape(site) != live.shape(site):
            raise LensError(
                f"{site} has shape {live.shape(site)} here and {found.shape(site)} in {found.store.name}"
            )
    return found


def _mixed(here: Tensor, there: Tensor, *, alpha: float) -> Tensor:
    ours, theirs = here.float(), there.to(here.device).float()
    return (ours + alpha * (theirs - ours)).to(here.dtype)


def left_behind(lens: Live, source: Source | Live, *, sites: Sites) -> Sequence[str]:
    """Return sentences on how the donor differs beside its weights at these sites.

    Base with all of tuned's weights is tuned to the bit only where this returns nothing.
    """
    donor = open_checkpoint(as_donor(source), base=lens.checkpoint.untouched)
    return tuple(_sentences(lens, donor, sites))


def _sentences(lens: Live, donor: Checkpoint, sites: Sites) -> Iterator[str]:
    live, name = lens.checkpoint, donor.store.name
    # A config in memory has every setting, one on disk only those that were saved. To compare the two would
    # report every default as a difference.
    ours = lens.source if lens.source is not None and donor.store.format != "memory" else live
    if settings := differing(ours.config, donor.config):
        yield f"The config of {name} differs, and a transplant does not copy it: {', '.join(settings)}."
    yield from compare_words(live.tokenizer, donor.tokenizer).findings
    merged = [site for site in sites if site.at() in donor.factors]
    if merged:
        yield (
            f"{name} changes {len(merged)} of these sites by an adapter, which is merged here: a model that "
            f"keeps the adapter apart rounds differently (first: {merged[0]})."
        )
    recast = [
        site for site in sites if site.at() not in donor.factors and donor.dtype(site) != ours.dtype(site)
    ]
    if recast:
        kinds = f"{donor.dtype(recast[0])} in {name} and {ours.dtype(recast[0])} here"
        yield f"{len(recast)} of these sites are {kinds} (first: {recast[0]})."
    if donor.tied != live.tied and any(site.role in VOCABULARY for site in sites):
        tied, own = (name, "here") if donor.tied else ("this model", f"in {name}")
        yield f"The output embedding of {tied} is its input embedding; {own} it is a separate matrix."
    other = [site for site in _buffers(lens) - sites if site in donor.sites and _differs(live, donor, site)]
    if other:
        yield f"{len(other)} buffers of {name} differ and are not among these sites (first: {other[0]})."


def _buffers(lens: Live) -> Sites:
    tensors = lens.parameters
    storage = lens.checkpoint.storage
    return Sites(s for s, where in storage.items() if not isinstance(tensors.get(where.tensor), nn.Parameter))


def _differs(live: Checkpoint, donor: Checkpoint, site: Site) -> bool:
    here, there = live.read(site), donor.read(site)
    return here.shape != there.shape or not torch.equal(here.cpu(), there.to(here.dtype).cpu())
