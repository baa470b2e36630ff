"""Sentences with figures: what may be said and what may not, and how numbers are written in them."""

from collections.abc import Iterable
from typing import NamedTuple

from affectlens.effects.effects import Effects
from affectlens.printable import plain

FEW = 50  # clusters below which the bootstrap's intervals are too narrow to be taken at their word
METHODS = (
    (
        "Δ is tuned minus base, read from the files on canonical, unfused parameters; no model was built for "
        "it. ‖·‖ is the Frobenius norm, rms is ‖Δ‖ over the root of the number of elements. Roles are added "
        "up by sums of squares, never by averaging ratios."
    ),
    (
        "Noise alone: what a change of one rms in every weight would give. The relative norm mostly follows "
        "1/‖W‖, so it can put a role first that did nothing."
    ),
    (
        "Transplant (sufficiency): the group's tuned weights in base. Revert (necessity): the group's base "
        "weights in tuned. Grafting as in arXiv 2302.06600; the claim under study is arXiv 2601.15906's."
    ),
    (
        "Null: real changes of the same shape, a random role of the group's family in each layer. Below 999 "
        "draws no p is printed. Nothing is corrected for the number of tasks, roles and metrics."
    ),
    (
        "Intervals are 95\N{NO-BREAK SPACE}%, those of changes paired by example: score intervals (Wilson, "
        "Tango) for accuracy of independent examples, for all else the BCa bootstrap over clusters of "
        f"examples, widened for small samples. With few clusters (below {FEW} or so) they cover less than "
        "they promise. Where zero lies inside, the effect is one that this data could not see. They speak "
        "for other examples, not for other runs of the tuning."
    ),
)


class Said(NamedTuple):
    """Two lists of sentences: what the numbers allow one to say, and what they don't."""

    may: tuple[str, ...] = ()
    may_not: tuple[str, ...] = ()

    def and_(self, other: "Said") -> "Said":
        """Return both, in order."""
        return Said(self.may + other.may, self.may_not + other.may_not)

    def of(self, task: str) -> "Said":
        """Return the sentences with the task's name before each; the report groups them by it."""
        may, may_not = (tuple(f"{task}: {one}" for one in sentences) for sentences in self)
        return Said(may, may_not)


def allowed(sentence: str) -> Said:
    """Say what may be concluded."""
    return Said(may=(sentence,))


def barred(sentence: str) -> Said:
    """Say what may not be concluded."""
    return Said(may_not=(sentence,))


def joined(parts: Iterable[Said]) -> Said:
    """Put several together, in order."""
    whole = Said()
    for part in parts:
        whole = whole.and_(part)
    return whole


def methods(effects: Effects | None) -> tuple[str, ...]:
    """The small print, with the number of clusters of each task that states it."""
    about = effects.origin.get("tasks", {}) if effects is not None else {}
    counts = {
        plain(task): int(facts["clusters"])
        for task, facts in about.items()
        if facts.get("clusters") is not None
    }
    if not counts:
        return METHODS
    each = ", ".join(f"{task} {count:,}{' (few)' if count < FEW else ''}" for task, count in counts.items())
    return (*METHODS, f"Independent clusters of examples: {each}.")
