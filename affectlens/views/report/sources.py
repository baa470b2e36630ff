"""Write what was compared: names, header hashes, sizes and settings, and the ledger of every parameter."""

from collections.abc import Iterable, Mapping
from typing import Any

from affectlens.drift.drift import Drift
from affectlens.printable import plain
from affectlens.table import Table
from affectlens.views.readings.numbers import percent
from affectlens.views.report.page import grid, items, paragraph, section
from affectlens.views.sentences.about_sources import difference, findings, strangers

FACTS = {
    "name": "name",
    "format": "format",
    "model_type": "model",
    "dtype": "dtype",
    "parameters": "parameters",
    "bytes": "size",
    "header_sha256": "header sha256",
    "content_sha256": "content sha256",
    "revision": "revision",
}
SETTINGS = {"seed": "seed", "dtype": "dtype of the live model", "device": "device"}


def compared(tables: Iterable[Table]) -> str:
    """Write findings, the sources side by side, then the settings.

    A later table adds the sides that an earlier one lacks, and sides that are another checkpoint.
    """
    tables = tuple(tables)
    sources: dict[str, Mapping[str, Any]] = {}
    for table in tables:
        for side, facts in table.origin.get("sources", {}).items():
            if difference(sources.setdefault(str(side), facts), facts):
                sources[f"{side} ({type(table).__name__})"] = facts
    settings = list(_merged(tables))
    later = findings(table for table in tables if isinstance(table, Drift))  # shown beside the ledger
    notes = [*strangers(tables), *(one for one in findings(tables) if one not in later)]
    facts = [fact for fact in FACTS if any(source.get(fact) is not None for source in sources.values())]
    rows = [[FACTS[fact], *(_fact(fact, source.get(fact)) for source in sources.values())] for fact in facts]
    sides = grid(["", *map(plain, sources)], rows, left=1 + len(sources))
    parts = [items(notes, "findings")] if notes else []
    parts += [f'<div class="sources">{sides}</div>'] if rows else []
    if settings:
        parts.append(grid(["setting", "value"], settings, left=2))
    return section("What was compared", *parts)


def ledger(drift: Drift) -> str:
    """Write the ledger and whether it accounts for every parameter of both sides."""
    rows = drift.ledger
    found = items(findings([drift]), "findings") if drift.findings else ""
    title = "Every parameter, accounted for"
    if rows.empty:
        return section(title, found)
    sides = {"base": "base_parameters", "tuned": "tuned_parameters"}
    totals = {side: int(rows[column].fillna(0).sum()) for side, column in sides.items()}
    words = " ".join(_accounted(drift, side, total=total) for side, total in totals.items())
    columns = ["state", "note", "sites", *sides.values()]
    body = [list(row) for row in rows[columns].astype(object).where(rows.notna(), None).to_numpy()]
    body.append(["total", "", int(rows["sites"].fillna(0).sum()), *totals.values()])
    table = grid(["state", "note", "sites", "base parameters", "tuned parameters"], body, left=2)
    return section(title, paragraph(words), found, table)


def _accounted(drift: Drift, side: str, *, total: int) -> str:
    stated = drift.origin.get("sources", {}).get(side, {}).get("parameters")
    if not stated:
        return f"The ledger lists {total:,} parameters of {side}."
    if int(stated) == total:
        return f"The ledger accounts for 100 % of {side}: {total:,} parameters."
    share = percent(total / int(stated))
    return f"The ledger does not account for all of {side}: {total:,} of {int(stated):,} ({share})."


def _merged(tables: Iterable[Table]) -> Iterable[tuple[str, str]]:
    """Yield a setting once if all tables agree, else once a table with the table's kind."""
    stated = [(type(table).__name__, dict(_settings(table))) for table in tables]
    stated = [(kind, found) for kind, found in stated if found]
    for name in dict.fromkeys(name for _, found in stated for name in found):
        values = [found.get(name) for _, found in stated]
        if len(set(values)) == 1:
            yield name, str(values[0])
        else:
            yield from ((f"{name} ({kind})", found[name]) for kind, found in stated if name in found)


def _settings(table: Table) -> Iterable[tuple[str, str]]:
    origin = table.origin
    if origin.get("versions"):
        yield "versions", ", ".join(f"{plain(name)} {plain(of)}" for name, of in origin["versions"].items())
    for name, words in SETTINGS.items():
        if origin.get(name) is not None:
            yield words, plain(origin[name])
    if origin.get("command"):
        command = origin["command"]
        words = command if isinstance(command, str) else " ".join(map(str, command))
        yield "command", plain(words)


def _fact(fact: str, value: Any) -> str:
    if value is None:
        return ""
    if fact == "bytes":
        return _bytes(float(value))
    return f"{value:,}" if fact == "parameters" and isinstance(value, int) else plain(value)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
