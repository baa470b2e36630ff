"""Pair two checkpoints by canonical site, and account for every parameter of both."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.settings import differing
from affectlens.checkpoints.tying import VOCABULARY, Twins, twins
from affectlens.checkpoints.vocabulary import Rows, Words, compare_words, within
from affectlens.errors import NothingToCompare, quoted
from affectlens.printable import plain
from affectlens.sites import Site, Sites, model_type

_REASONS = 4  # listed in a note


@dataclass(frozen=True)
class Pairing:
    """The sites of two checkpoints: comparable, of different shapes, and on one side only.

    A parameter whose shape gives it another role on one side is `reshaped` too; it has a site on each side.
    """

    base: Checkpoint
    tuned: Checkpoint
    comparable: Sites
    reshaped: Sites
    only_base: Sites
    only_tuned: Sites

    @property
    def resized(self) -> Sites:
        """The reshaped sites of a resized vocabulary: their first rows are the same words."""
        return Sites(
            s for s in self.reshaped if s.role in VOCABULARY and _rows_alone(self.base, self.tuned, s)
        )

    @cached_property
    def twins(self) -> Twins:
        """The embeddings that one side stores, and the other side ties to its other embedding."""
        return twins(self.base, self.tuned)

    @cached_property
    def words(self) -> Words:
        """How the tokenizers of the two differ."""
        return compare_words(self.base.store, self.tuned.store)

    @cached_property
    def matched(self) -> Mapping[Site, tuple[Rows, Rows]]:
        """The rows of the same tokens in base and tuned, for embeddings whose tokens are in another order."""
        # An adapter's rows are those of its base.
        if self.words.rows is None or self.tuned.change is not None:
            return {}
        found = {}
        for site in self.compared:
            if site.role in VOCABULARY and site.tower == "language":
                base, tuned = (side.shape(site)[0] for side in self.sides(site))
                found[site] = within(self.words.rows, (base, tuned))
        return found

    @property
    def compared(self) -> Sites:
        """All sites that a diff compares: whole, in their common rows, or with a tied embedding."""
        return self.comparable | self.resized | Sites(self.twins.rows)

    def sides(self, site: Site) -> tuple[Checkpoint, Checkpoint]:
        """Return base and tuned as a diff reads a site: of a side that ties it, its other embedding."""
        return self.twins.rows.get(site, (self.base, self.tuned))

    def ledger(self, identical: frozenset[Site]) -> list[dict[str, Any]]:
        """Return one row for each state that occurs, given the comparable sites found `identical`.

        The columns of parameters add up to the total of each checkpoint.
        """
        tied, copies = Sites(self.twins.rows), self.twins.copies
        matched = Sites(self.matched) - tied
        whole = self.comparable - matched
        reached = Sites(site for site in whole if self.tuned.targeted(site))
        states = {
            "paired": (whole - identical, "compared, and moved"),
            "identical": (reached & identical, "compared, equal in every value: did not move"),
            "not-targeted": (
                (whole - reached) & identical,
                "not part of the adapter: could not move",
            ),
            "matched": (matched, "the rows of the same tokens were compared"),
            "resized": (self.resized - matched, "the rows that both sides have were compared"),
            "reshaped": (self.reshaped - self.resized, "not compared: the shapes differ"),
            "tied": (tied, "compared with the matrix that the other side uses as both embeddings"),
            "copied": (copies, "the same matrix as the other embedding, which was compared"),
            "only-base": (self.only_base - tied - copies, "not in tuned: not compared"),
            "only-tuned": (self.only_tuned - tied - copies, "not in base: not compared"),
        }
        rows = [
            {
                "state": state,
                "sites": self._number(sites),
                "base_parameters": _count(self.base, sites),
                "tuned_parameters": _count(self.tuned, sites),
                "note": note,
            }
            for state, (sites, note) in states.items()
            # `paired` is listed even without sites: that nothing moved is a result.
            if len(sites) or state == "paired"
        ]
        return [*rows, *self._skipped()]

    def _skipped(self) -> list[dict[str, Any]]:
        sides = [self.base.skipped, self.tuned.skipped]
        if not any(sides):
            return []
        reasons = sorted({why for side in sides for why, _ in side.values()})
        counts = [sum(size for _, size in side.values()) for side in sides]
        return [
            {
                "state": "skipped",
                "sites": len(sides[0].keys() | sides[1].keys()),
                "base_parameters": counts[0],
                "tuned_parameters": counts[1],
                "note": "stored, and not compared: " + "; ".join(reasons[:_REASONS]),
            }
        ]

    @property
    def unlike(self) -> tuple[str, ...]:
        """Sentences on how tuned differs from base, apart from the values of comparable parameters.

        A transplant carries none of it over: base with all of tuned's weights is then still not tuned.
        """
        found = []
        for sites, words in (
            (self.reshaped, "have another shape"),
            (self.only_tuned, "are stored in tuned alone"),
            (self.only_base, "are stored in base alone"),
        ):
            if sites:
                found.append(f"{self._number(sites)} parameters {words} (first: {sites[0].parameter}).")
        found += [
            f"{tower} has {one} layers in base and {two} in tuned."
            for tower, (one, two) in self._layers().items()
            if one != two
        ]
        if recast := self._recast():
            kinds = " → ".join(side.dtype(recast[0]) for side in self.sides(recast[0]))
            first = f"first: {recast[0].parameter}, {kinds}"
            found.append(f"{len(recast)} compared parameters have another dtype on the two sides ({first}).")
        found += self.words.findings
        if self._ties():
            found.append("The output embedding is tied to the input embedding on one side only.")
        for name, side in (("base", self.base), ("tuned", self.tuned)):
            for why, tensors in _by_reason(side).items():
                found.append(f"{len(tensors)} tensors of {name} were skipped: {why} (first: {tensors[0]}).")
        settings = differing(self.base.config, self.tuned.config)
        if settings:
            found.append(f"The configs differ in {', '.join(settings)}.")
        return tuple(found)

    def _number(self, sites: Sites) -> int:
        """Count sites; a parameter with a different site on each side counts once."""
        return max(sum(site in side.storage for site in sites) for side in (self.base, self.tuned))

    def _layers(self) -> dict[str, tuple[int, int]]:
        """Return the layers of base and tuned by tower and stack, where both have any."""
        counts = [_layers(side) for side in (self.base, self.tuned)]
        return {name: (counts[0][name], counts[1][name]) for name in counts[0].keys() & counts[1].keys()}

    def _recast(self) -> list[Site]:
        """Return the compared sites stored in different dtypes; sites that factors change have none."""
        changed = self.base.factors.keys() | self.tuned.factors.keys()
        kept = (site for site in self.compared if site not in changed)
        return [site for site in kept if len({side.dtype(site) for side in self.sides(site)}) > 1]

    def _ties(self) -> bool:
        return self.base.tied != self.tuned.tied and not self.twins.copies


def pair(base: Checkpoint, tuned: Checkpoint) -> Pairing:
    """Pair two checkpoints; raises `NothingToCompare` if no weight matrix has a partner.

    A tuned file may hold only a part of the model, such as the trained tensors; the names of base then
    help to recognise its tensors.
    """
    if len(tuned.laid) < len(base.laid) and tuned.sites - base.sites:
        tuned = Checkpoint(tuned.store, like=base)
    both = base.sites & tuned.sites
    comparable = Sites(site for site in both if base.shape(site) == tuned.shape(site))
    # Norms of equal width pair by chance between unrelated models; matrices hardly ever do.
    if not any(len(base.shape(site)) >= 2 and 0 not in base.shape(site) for site in comparable):
        raise _nothing(base, tuned)
    lone = base.sites - tuned.sites, tuned.sites - base.sites
    names = [{_name(side, site) for site in sites} for side, sites in zip((base, tuned), lone, strict=True)]
    # The same tensor by name, but another site on each side: its shape gave it another role there.
    apart = [
        Sites(site for site in sites if _name(side, site) in names[0] & names[1])
        for side, sites in zip((base, tuned), lone, strict=True)
    ]
    reshaped = (both - comparable) | apart[0] | apart[1]
    return Pairing(base, tuned, comparable, reshaped, lone[0] - apart[0], lone[1] - apart[1])


def _nothing(base: Checkpoint, tuned: Checkpoint) -> NothingToCompare:
    named = [
        f"{plain(side.store.name)} ({model_type(side.config) or 'unknown type'})" for side in (base, tuned)
    ]
    first = next((site.parameter for site in tuned.sites), "none")
    reasons = dict.fromkeys(why for side in (base, tuned) for why, _ in side.skipped.values())
    skipped = f" Tensors were skipped: {'; '.join(list(reasons)[:_REASONS])}." if reasons else ""
    return NothingToCompare(
        f"none of the {len(tuned.sites)} parameters of {named[1]} has a partner of its shape in {named[0]}; "
        f"first: {quoted(first)}. Is this the right base?{skipped}"
    )


def _name(side: Checkpoint, site: Site) -> str:
    """Return the canonical name of the tensor that holds a site."""
    return side.laid[side.storage[site].tensor].name


def _layers(side: Checkpoint) -> dict[str, int]:
    found: dict[str, set[int]] = {}
    for site in side.sites:
        if site.layer is not None:
            found.setdefault(f"{site.tower} {site.stack or ''}".strip(), set()).add(site.layer)
    return {name: len(layers) for name, layers in sorted(found.items())}


def _rows_alone(base: Checkpoint, tuned: Checkpoint, site: Site) -> bool:
    if site not in base.storage or site not in tuned.storage:
        return False
    one, two = base.shape(site), tuned.shape(site)
    return len(one) == len(two) > 0 and one[1:] == two[1:]


def _by_reason(side: Checkpoint) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tensor, (why, _) in side.skipped.items():
        found.setdefault(why, []).append(tensor)
    return found


def _count(side: Checkpoint, sites: Sites) -> int:
    return sum(side.storage[site].size for site in sites if site in side.storage)
