"""Pair two checkpoints on canonical sites, and account for every parameter of both."""

from dataclasses import dataclass
from typing import Any

from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.configs import differing
from affectlens.errors import NothingToCompare
from affectlens.sites import Site, Sites

_REASONS = 4  # that a note has room for
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Pairing:
    """Sort the sites of two checkpoints: to compare, of another shape, and on one side only."""

    base: Checkpoint
    tuned: Checkpoint
    comparable: Sites
    reshaped: Sites
    only_base: Sites
    only_tuned: Sites

    @property
    def resized(self) -> Sites:
        """Of the reshaped, those of a resized vocabulary: their first rows are the same words."""
        return Sites(
            s for s in self.reshaped if s.role in VOCABULARY and _rows_alone(self.base, self.tuned, s)
        )

    @property
    def compared(self) -> Sites:
        """All that a diff compares, wholly or in their common rows."""
        return self.comparable | self.resized

    def ledger(self, identical: frozenset[Site]) -> list[dict[str, Any]]:
        """Account for all parameters, given which of the comparable sites turned out identical.

        One row a state that occurs; the columns of parameters add up to each checkpoint's total.
        """
        tied = Sites(s for s in self.only_base | self.only_tuned if s.role == "lm_head" and self._ties())
        reached = Sites(site for site in self.comparable if self.tuned.targeted(site))
        states = {
            "paired": (self.comparable - identical, "compared, and moved"),
            "identical": (reached & identical, "compared, equal in every value: did not move"),
            "not-targeted": (
                (self.comparable - reached) & identical,
                "not part of the adapter: could not move",
            ),
            "resized": (self.resized, "the rows that both sides have were compared"),
            "reshaped": (self.reshaped - self.resized, "not compared: the shapes differ"),
            "tied": (tied, "stored on one side, tied to the input embedding on the other: not compared"),
            "only-base": (self.only_base - tied, "not in tuned"),
            "only-tuned": (self.only_tuned - tied, "not in base"),
        }
        rows = [
            {
                "state": state,
                "sites": len(sites),
                "base_parameters": _count(self.base, sites),
                "tuned_parameters": _count(self.tuned, sites),
                "note": note,
            }
            for state, (sites, note) in states.items()
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
        """What tells tuned from base beside the values of comparable parameters, in sentences.

        A transplant carries over none of it, so base with all of tuned's weights is not tuned then.
        """
        found = []
        for sites, words in (
            (self.reshaped, "have another shape"),
            (self.only_tuned, "are stored in tuned alone"),
            (self.only_base, "are stored in base alone"),
        ):
            if sites:
                found.append(f"{len(sites)} parameters {words} (first: {sites[0].parameter}).")
        if self._ties():
            found.append("The output embedding is tied to the input embedding on one side only.")
        for name, side in (("base", self.base), ("tuned", self.tuned)):
            for why, tensors in _by_reason(side).items():
                found.append(f"{len(tensors)} tensors of {name} were skipped: {why} (first: {tensors[0]}).")
        settings = differing(self.base.config, self.tuned.config)
        if settings:
            found.append(f"The configs differ in {', '.join(settings)}.")
        return tuple(found)

    def _ties(self) -> bool:
        return self.base.tied != self.tuned.tied


def pair(base: Checkpoint, tuned: Checkpoint) -> Pairing:
    """Pair two checkpoints; raises `NothingToCompare` when no weight matrix has a partner.

    A tuned file may hold a part of the model, e.g. what was trained; it is then read beside base.
    """
    if len(tuned.laid) < len(base.laid) and tuned.sites - base.sites:
        tuned = Checkpoint(tuned.store, like=base)
    both = base.sites & tuned.sites
    comparable = Sites(site for site in both if base.shape(site) == tuned.shape(site))
    # Norms of equal width pair by chance between unrelated models; only matrices show kinship.
    if not any(len(base.shape(site)) >= 2 for site in comparable):
        kinds = [str(side.config.get("model_type", "unknown type")) for side in (base, tuned)]
        first = next((site.parameter for site in tuned.sites), "none")
        raise NothingToCompare(
            f"none of the {len(tuned.sites)} parameters of {tuned.store.name} ({kinds[1]}) has a partner of "
            f"its shape in {base.store.name} ({kinds[0]}); first: {first!r}. Is this the right base?"
        )
    return Pairing(
        base, tuned, comparable, both - comparable, base.sites - tuned.sites, tuned.sites - base.sites
    )


def _rows_alone(base: Checkpoint, tuned: Checkpoint, site: Site) -> bool:
    one, two = base.shape(site), tuned.shape(site)
    return len(one) == len(two) > 0 and one[1:] == two[1:]


def _by_reason(side: Checkpoint) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tensor, (why, _) in side.skipped.items():
        found.setdefault(why, []).append(tensor)
    return found


def _count(side: Checkpoint, sites: Sites) -> int:
    return sum(side.storage[site].size for site in sites if site in side.storage)
