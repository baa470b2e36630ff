"""Report: tables as sentences, figures and numbers in one file that needs no network."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from affectlens.drift.drift import Drift
from affectlens.effects.effects import Effects
from affectlens.files import write_text
from affectlens.html import text
from affectlens.printable import plain, sentence
from affectlens.table import Table
from affectlens.views.readings.of_effects import outcomes
from affectlens.views.report.page import grid, items, page, paragraph, section
from affectlens.views.report.sections import drift_sections, effect_sections
from affectlens.views.report.sources import compared, ledger
from affectlens.views.sentences.conclusions import BRACKETS, Conclusions, conclude
from affectlens.views.sentences.wording import methods

MOST = 40  # rows shown of a table without figures


class Report:
    """A page on a `Drift`, an `Effects` or both: sentences, figures and numbers; other tables follow below.

    >>> import affectlens as al
    >>> base, tuned, *_ = al.load_demo()
    >>> report = al.Report(al.diff(base, tuned, progress=False), title="What the tuning moved")
    >>> report
    Report('What the tuning moved': Drift, base → tuned)
    >>> print(report.conclusions.answer)
    By ‖Δ‖/‖W‖, k_proj moved most.
    """

    def __init__(self, *tables: Table, title: str = "Where the change is", notes: Iterable[str] = ()) -> None:
        self.tables = tables
        self.title = title
        self.notes = (notes,) if isinstance(notes, str) else tuple(notes)

    @cached_property
    def conclusions(self) -> Conclusions | None:
        """What may and may not be concluded, or None without a `Drift` or `Effects`."""
        drift, effects = self._drift, self._effects
        return None if drift is None and effects is None else conclude(drift, effects)

    @property
    def html(self) -> str:
        """The whole report as one HTML page that loads nothing; every name is escaped."""
        drift, effects = self._drift, self._effects
        body = [
            self._head(),
            compared(self.tables),
            self._findings(),
            *([ledger(drift), drift_sections(drift)] if drift is not None else []),
            effect_sections(effects) if effects is not None else "",
            *(_other(table) for table in self.tables if table is not drift and table is not effects),
            section("Methods and limits", items((*methods(effects), *map(sentence, self.notes)), "small")),
        ]
        return page(self.title, "".join(body))

    def save(self, path: str | Path = "report.html") -> Path:
        """Write the report as one file; on error no partial file is left behind."""
        write_text(path, self.html)
        return Path(path)

    def __repr__(self) -> str:
        return f"Report({plain(self.title)!r}: {'; '.join(table.title for table in self.tables)})"

    def _repr_html_(self) -> str:
        more = paragraph('To save the whole report with its figures: .save("report.html")')
        return f"<div>{self._head()}{self._findings()}{more}</div>"

    @property
    def _drift(self) -> Drift | None:
        return next((table for table in self.tables if isinstance(table, Drift)), None)

    @property
    def _effects(self) -> Effects | None:
        return next((table for table in self.tables if isinstance(table, Effects)), None)

    def _head(self) -> str:
        found = self.conclusions
        answer = paragraph(found.answer, "answer") if found else ""
        return f"<header><h1>{text(plain(self.title))}</h1>{answer}</header>"

    def _findings(self) -> str:
        found = self.conclusions
        if found is None:
            return ""
        columns = (
            ("May be concluded", found.may, "may", "Across tasks, and the weights"),
            ("May not be concluded", found.may_not, "not", "Across tasks, the weights, and general limits"),
        )
        cards = "".join(
            f'<div class="{kind}"><h3>{title}</h3>{self._grouped(sentences, last)}</div>'
            for title, sentences, kind, last in columns
            if sentences
        )
        note = paragraph(BRACKETS, "note") if self._effects is not None else ""
        return section("Findings", f'<div class="columns">{cards}</div>', note)

    def _grouped(self, sentences: Iterable[str], last: str) -> str:
        # Sentences on a task begin with its name, which the heading then replaces.
        tasks = [] if self._effects is None else [f"{plain(one.task)}: " for one in outcomes(self._effects)]
        groups: dict[str, list[str]] = {}
        for said in sentences:
            task = next((task for task in tasks if said.startswith(task)), "")
            rest = said.removeprefix(task)
            begins = task and "_" not in rest.split(" ")[0]  # a name such as gate_proj keeps its small letter
            groups.setdefault(task, []).append(rest[:1].upper() + rest[1:] if begins else rest)
        return "".join(
            f"<h4>{text(task.removesuffix(': ') or last)}</h4>{items(found)}"
            for task, found in groups.items()
        )


def _other(table: Table) -> str:
    frame = table.frame.head(MOST)
    rows = frame.astype(object).where(frame.notna(), None).itertuples(index=False)
    more = paragraph(f"The first {MOST} of {len(table):,} rows.") if len(table) > MOST else ""
    return section(
        type(table).__name__, paragraph(table.summary), grid([plain(c) for c in frame], rows), more
    )
