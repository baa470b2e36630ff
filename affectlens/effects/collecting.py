"""Judge every model of a sweep once: what the journal has is taken from it, the rest is kept as it comes."""

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from affectlens.effects.journal import Journal
from affectlens.effects.judging import Ask, Bench, Judged, judged_there, scene_of
from affectlens.executing import Failed, execute
from affectlens.lens import remembering_senses
from affectlens.sites import Sites

Collected = tuple[dict[Ask, Judged], dict[Ask, Failed]]


def collect(
    bench: Bench,
    asks: Iterable[Ask],
    *,
    needed: Collection[Ask],
    executor: Any = None,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Collected:
    """Judge each model once, in order; what fails wherever it is tried is left out and told.

    Of those that are `needed`, the error is raised.
    """
    wanted = list(dict.fromkeys(asks))
    changed = Sites(site for ask in wanted for step in ask.steps for site in step.sites)
    failed: dict[Ask, Failed] = {}
    with ExitStack() as stack:
        shelf = _Shelf(bench, Journal(journal) if journal is not None else None)
        stack.callback(shelf.close)
        judged = {ask: known for ask in wanted if (known := shelf.known(ask)) is not None}
        left = [ask for ask in wanted if ask not in judged]
        work = _here(bench, changed, stack) if executor is None else _there(bench, changed)
        bar = tqdm(
            total=len(wanted),
            initial=len(judged),
            unit="model",
            disable=None if progress else True,
            leave=False,
        )
        stack.enter_context(bar)
        for ask, outcome in stack.enter_context(closing(execute(work, left, executor=executor))):
            if not isinstance(outcome, Failed):
                judged[ask] = outcome
                shelf.keep(ask, outcome)
            elif ask in needed:
                raise outcome.error
            else:
                failed[ask] = outcome
            bar.update()
    return judged, failed


def _here(bench: Bench, changed: Sites, stack: ExitStack) -> Callable[[Ask], Judged]:
    lens = bench.lens
    stack.enter_context(remembering_senses(lens.model, lens.checkpoint, changed=changed))
    return bench.judged


def _there(bench: Bench, changed: Sites) -> Callable[[Ask], Judged]:
    return partial(judged_there, scene_of(bench, changed=changed))


@dataclass(frozen=True)
class _Shelf:
    """Where results are kept, if anywhere."""

    bench: Bench
    journal: Journal | None

    def known(self, ask: Ask) -> Judged | None:
        """What was found before, by every task that is asked."""
        if self.journal is None:
            return None
        found = {task: self.journal.found(self.bench.key(ask, task)) for task in ask.tasks}
        known = {task: logps for task, logps in found.items() if logps is not None}
        return known if len(known) == len(found) else None

    def keep(self, ask: Ask, judged: Judged) -> None:
        """Keep what was found."""
        if self.journal is not None:
            self.journal.keep({self.bench.key(ask, task): logps for task, logps in judged.items()})

    def close(self) -> None:
        """Let go of the file."""
        if self.journal is not None:
            self.journal.close()
