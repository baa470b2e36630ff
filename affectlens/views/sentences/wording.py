"""Sentences on what may and what may not be concluded, and the small print of the report."""

from collections.abc import Iterable
from typing import NamedTuple

from affectlens.effects.effects import Effects
from affectlens.printable import plain

FEW = 50  # clusters, below which the intervals of the bootstrap are too narrow
RARE = 0.05  # an effect exceeds its null if at most this share of the draws is as strong or stronger
ENOUGH = 999  # with fewer draws there is no p, and an effect above its null stays an open question
METHODS = (
    (
        "Δ is tuned minus base, read from the files as canonical, unfused parameters; no model is built for "
        "it. ‖·‖ is the Frobenius norm; rms is ‖Δ‖ divided by the square root of the number of elements. "
        "Totals of a role add up squares; ratios are never averaged."
    ),
    (
        "iid noise: the expected value if every weight changed by independent noise of one rms, that of all "
        "these roles together. The relative norm mostly follows 1/‖W‖, so it can rank a role first that does "
        "nothing."
    ),
    (
        "Gain: tuned minus base. Transplant (sufficiency): the group's tuned weights, put into base, recover "
        "a share of the gain. Revert (necessity): the group's base weights, put back into tuned, undo a "
        "share. Weight grafting as in arXiv 2302.06600; the claim under study is that of arXiv 2601.15906."
    ),
    (
        "Null: real changes of the same shape, those of a random role of the group's family in each layer. "
        f"An effect exceeds its null if at most {100 * RARE:.0f}\N{NO-BREAK SPACE}% of the draws are as "
        f"strong or stronger; with fewer than {ENOUGH} draws that stays open and no p is given. Nothing is "
        "corrected for the number of tasks, roles and metrics."
    ),
    (
        "Intervals are 95\N{NO-BREAK SPACE}%; those of changes are paired by example. Accuracy of "
        "independent examples has score intervals (Wilson, Tango), everything else, and accuracy with ties, "
        "the BCa bootstrap over "
        f"clusters of examples, widened for small samples. With few clusters (below about {FEW}) they cover "
        "less than 95\N{NO-BREAK SPACE}%. If an interval includes zero, no effect was detected, which does "
        "not show that there is none. Intervals cover other examples, not other runs of the tuning."
    ),
)


class Said(NamedTuple):
    """Sentences that may be concluded, and sentences on what may not."""

    may: tuple[str, ...] = ()
    may_not: tuple[str, ...] = ()

    def and_(self, other: "Said") -> "Said":
        """Return the sentences of both, in order."""
        return Said(self.may + other.may, self.may_not + other.may_not)

    def of(self, task: str) -> "Said":
        """Return the sentences with the task's name before each; the report groups them by it."""
        may, may_not = (tuple(f"{task}: {one}" for one in sentences) for sentences in self)
        return Said(may, may_not)


def allowed(sentence: str) -> Said:
    """Return one sentence that may be concluded."""
    return Said(may=(sentence,))


def barred(sentence: str) -> Said:
    """Return one sentence on what may not be concluded."""
    return Said(may_not=(sentence,))


def joined(parts: Iterable[Said]) -> Said:
    """Return the sentences of several, in order."""
    whole = Said()
    for part in parts:
        whole = whole.and_(part)
    return whole


def methods(effects: Effects | None) -> tuple[str, ...]:
    """Return the small print, with the number of clusters of each task that states it."""
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
