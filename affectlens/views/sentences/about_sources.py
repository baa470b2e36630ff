"""Say whether several tables come from the same checkpoints, and which findings they carry."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from affectlens.printable import plain, sentence
from affectlens.table import Table
from affectlens.views.readings.numbers import listed

HASH = 8  # characters of a hash that are shown in a sentence


def strangers(tables: Iterable[Table]) -> tuple[str, ...]:
    """Say which pairs of tables certainly come from different checkpoints, and how these differ.

    Models in memory have no hash, so they are never reported.
    """
    found = []
    for one, two in combinations(tables, 2):
        ours, theirs = one.origin.get("sources", {}), two.origin.get("sources", {})
        unlike = [(side, difference(ours[side], theirs[side])) for side in ours if side in theirs]
        if named := [f"{plain(side)} ({words})" for side, words in unlike if words]:
            kinds = [type(table).__name__ for table in (one, two)]
            found.append(
                f"The {kinds[0]} and the {kinds[1]} are not of the same checkpoints: they differ in "
                f"{listed(named)}. What one shows says nothing about the other."
            )
    return tuple(found)


def findings(tables: Iterable[Table]) -> tuple[str, ...]:
    """Return the findings stored in the tables (what looked wrong when they were made), each once."""
    return tuple(dict.fromkeys(sentence(one) for table in tables for one in table.origin.get("findings", ())))


def difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Say how two sources certainly differ: in the hash of the content, else of the header, else in size."""

    def unlike(fact: str) -> bool:
        return bool(one[fact] != two[fact])

    def known(*facts: str) -> bool:
        return all(source.get(fact) is not None for source in (one, two) for fact in facts)

    # Equal content settles it: the same weights may be stored under different headers and sizes.
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
