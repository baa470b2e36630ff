"""Whether several tables are of the same checkpoints, and what their makers found amiss, as sentences."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from affectlens.printable import plain, sentence
from affectlens.table import Table
from affectlens.views.readings.numbers import listed

HASH = 8  # characters of a hash that are shown in a sentence


def strangers(tables: Iterable[Table]) -> tuple[str, ...]:
    """Say of each two tables whether a side of one is certainly another checkpoint than in the other.

    Models in memory have no hash, so of them it can't be told.
    """
    found = []
    for one, two in combinations(tables, 2):
        ours, theirs = one.origin.get("sources", {}), two.origin.get("sources", {})
        unlike = [(side, difference(ours[side], theirs[side])) for side in ours if side in theirs]
        if named := [f"{plain(side)} ({words})" for side, words in unlike if words]:
            kinds = [type(table).__name__ for table in (one, two)]
            found.append(
                f"The {kinds[0]} and the {kinds[1]} are not of the same checkpoints: they differ in "
                f"{listed(named)}. What one shows says nothing of the other."
            )
    return tuple(found)


def findings(tables: Iterable[Table]) -> tuple[str, ...]:
    """What the tables' makers found amiss, each once."""
    return tuple(dict.fromkeys(sentence(one) for table in tables for one in table.origin.get("findings", ())))


def difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Say in what two sources differ for certain: in the content's hash, or else the header's or the size."""

    def unlike(fact: str) -> bool:
        return bool(one[fact] != two[fact])

    def known(*facts: str) -> bool:
        return all(source.get(fact) is not None for source in (one, two) for fact in facts)

    if known("content_sha256"):
        return _hashes(one, two, fact="content_sha256") if unlike("content_sha256") else ""
    if not known("header_sha256", "bytes"):
        return ""
    if unlike("header_sha256"):
        return _hashes(one, two, fact="header_sha256")
    return f"{one['bytes']:,} and {two['bytes']:,} bytes" if unlike("bytes") else ""


def _hashes(one: Mapping[str, Any], two: Mapping[str, Any], *, fact: str) -> str:
    ours, theirs = (plain(source[fact])[:HASH] for source in (one, two))
    return f"{fact.replace('_', ' ')} {ours}… and {theirs}…"
