"""Judge changed models, here or in a worker: what is done to base, in words that travel, and the answers.

Ask (steps: whose weights at which sites; tasks) ──▶ interventions ──▶ log-probabilities of the labels
"""

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.checkpoints.opening import opens_again
from affectlens.effects.caching import remembering_senses
from affectlens.effects.evaluating import Prepared, judge, prepare_task
from affectlens.effects.journal import Journal, combined, fingerprint
from affectlens.errors import LensError, Remark
from affectlens.executing import Failed, execute
from affectlens.interventions import Transplant, Zero
from affectlens.lens import Intervention, Lens, load
from affectlens.sites import Sites
from affectlens.table import versions
from affectlens.tasks import Task

Judged = dict[str, Float[np.ndarray, "examples labels"]]  # by task


class WeightChange(NamedTuple):
    """One change of weights: those of a donor, or without one zeros."""

    sites: Sites
    donor: str = ""


class Ask(NamedTuple):
    """A model to judge: base after some steps, by some tasks."""

    steps: tuple[WeightChange, ...]
    tasks: tuple[str, ...]


Collected = tuple[dict[Ask, Judged], dict[Ask, Failed]]


@dataclass
class SweepContext:
    """A live base, the donors and the tasks by their names; tasks lie in batches that fit into memory."""

    lens: Lens
    donors: Mapping[str, Checkpoint]
    prepared: dict[str, Prepared]

    def __post_init__(self) -> None:
        self._prints = {name: one.fingerprint for name, one in self.prepared.items()}

    def judged(self, ask: Ask) -> Judged:
        """The log-probabilities of the labels, float32."""
        found: Judged = {}
        with _quiet(), self.lens.intervene(*map(self._intervention, ask.steps)):
            for name in ask.tasks:
                logps, self.prepared[name] = judge(self.lens, self.prepared[name])
                found[name] = logps.numpy()
        return found

    def _intervention(self, step: WeightChange) -> Intervention:
        return Transplant(step.sites, donor=self.donors[step.donor]) if step.donor else Zero(step.sites)

    @cached_property
    def weights(self) -> str:
        """A print of the live weights, and of what else decides what they do."""
        config: Any = getattr(self.lens.model, "config", None)
        settings = config.to_json_string() if hasattr(config, "to_json_string") else ""
        return combined(fingerprint(self.lens.parameters), settings, self.lens.device.type)

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {
            name: fingerprint((site.parameter, donor.read(site)) for site in donor.sites & self.lens.sites)
            for name, donor in self.donors.items()
        }

    def key(self, ask: Ask, task: str) -> str:
        """What a result is kept under: the weights at hand, what is done to them, and what is asked."""
        done = [[self._sources.get(s.donor, ""), [str(astuple(site)) for site in s.sites]] for s in ask.steps]
        return combined(versions(), self.weights, done, self._prints[task])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks on entering: the table says once what a transplant leaves behind, and what zeros do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)
        yield


@dataclass(frozen=True)
class Scene:
    """What a worker needs to set up a bench: sources and tasks, no tensors."""

    base: str
    donors: tuple[tuple[str, str], ...]  # name, source
    dtype: str
    device: str
    tasks: tuple[Task, ...]
    batch_size: int
    changed: Sites
    weights: str  # a print of those at hand
    code: str = ""  # the revision of the model's own code, where that was allowed to run


_LOCK = threading.Lock()  # weights are swapped: one model at a time in a process


_at_hand: list[tuple[Scene, SweepContext, ExitStack]] = []  # one at most


def judged_there(scene: Scene, ask: Ask) -> Judged:
    """What a worker does; its model stays loaded for the next."""
    with _LOCK:
        if not _at_hand or _at_hand[0][0] != scene:
            while _at_hand:
                _at_hand.pop()[2].close()
            _at_hand.append((scene, *_set_up(scene)))
        return _at_hand[0][1].judged(ask)


def _set_up(scene: Scene) -> tuple[SweepContext, ExitStack]:
    lens = load(
        scene.base,
        device=scene.device,
        dtype=scene.dtype,
        trust_remote_code=bool(scene.code),
        revision=scene.code or None,
    )
    base = lens.source or lens.checkpoint
    donors = {name: open_checkpoint(source, base=base) for name, source in scene.donors}
    tasks = {task.name: prepare_task(lens, task, batch_size=scene.batch_size) for task in scene.tasks}
    bench = SweepContext(lens, donors, tasks)
    if bench.weights != scene.weights:
        raise LensError(
            "a worker that loads the base gets other weights than those at hand; leave executor= out where a "
            "model was changed after it was loaded"
        )
    stack = ExitStack()
    stack.enter_context(remembering_senses(lens.model, lens.checkpoint, changed=scene.changed))
    return bench, stack


def scene_of(bench: SweepContext, *, changed: Sites) -> Scene:
    """The scene of a bench; raises `LensError` for what no worker could open again."""
    lens, fix = bench.lens, "leave executor= out, or give paths or hub ids"
    if lens.source is None or not lens.source.store.source:
        raise LensError(f"{lens!r} was not loaded from files, so a worker can't load it: {fix}")
    for name, donor in bench.donors.items():
        if not donor.store.source:
            raise LensError(f"the {name} model is only in memory, so a worker can't open it: {fix}")
        if not opens_again(donor, lens.source):
            raise LensError(f"the {name} model was opened in a way that a worker would not know: {fix}")
    return Scene(
        base=lens.source.store.source,
        donors=tuple((name, donor.store.source) for name, donor in bench.donors.items()),
        dtype=str(next(iter(lens.parameters.values())).dtype).removeprefix("torch."),
        device=str(lens.device),
        tasks=tuple(one.task for one in bench.prepared.values()),
        batch_size=max(one.batch_size for one in bench.prepared.values()),
        changed=changed,
        weights=bench.weights,
        code=str((lens.remote_code or {}).get("revision", "")),
    )


def collect(
    bench: SweepContext,
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


def _here(bench: SweepContext, changed: Sites, stack: ExitStack) -> Callable[[Ask], Judged]:
    lens = bench.lens
    stack.enter_context(remembering_senses(lens.model, lens.checkpoint, changed=changed))
    return bench.judged


def _there(bench: SweepContext, changed: Sites) -> Callable[[Ask], Judged]:
    return partial(judged_there, scene_of(bench, changed=changed))


@dataclass(frozen=True)
class _Shelf:
    """Where results are kept, if anywhere."""

    bench: SweepContext
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
