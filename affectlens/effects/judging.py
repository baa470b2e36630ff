"""Judge changed models, here or in a worker: what is done to base, in words that travel, and the answers.

JudgingJob (steps: whose weights at which sites; tasks) ──▶ interventions ──▶ log-probabilities of the labels
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
from affectlens.effects.evaluating import PreparedTask, judge, prepare_task
from affectlens.effects.journal import Journal, combined, fingerprint
from affectlens.errors import LensError, Remark
from affectlens.executing import Failed, execute
from affectlens.interventions import Transplant, Zero
from affectlens.lens import Intervention, Lens, load
from affectlens.sites import Sites
from affectlens.table import versions
from affectlens.tasks import Task

Answers = dict[str, Float[np.ndarray, "examples labels"]]  # by task


class WeightChange(NamedTuple):
    """One change of weights: those of a donor, or without one zeros."""

    sites: Sites
    donor: str = ""


class JudgingJob(NamedTuple):
    """A model to judge: base after some steps, by some tasks."""

    steps: tuple[WeightChange, ...]
    tasks: tuple[str, ...]


Collected = tuple[dict[JudgingJob, Answers], dict[JudgingJob, Failed]]


@dataclass
class SweepContext:
    """A live base, the donors and the tasks by their names; tasks lie in batches that fit into memory."""

    lens: Lens
    donors: Mapping[str, Checkpoint]
    prepared: dict[str, PreparedTask]

    def __post_init__(self) -> None:
        self._fingerprints = {name: one.fingerprint for name, one in self.prepared.items()}

    def judge(self, job: JudgingJob) -> Answers:
        """The log-probabilities of the labels, float32."""
        found: Answers = {}
        with _quiet(), self.lens.intervene(*map(self._intervention, job.steps)):
            for name in job.tasks:
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
    def _donor_fingerprints(self) -> dict[str, str]:
        return {
            name: fingerprint((site.parameter, donor.read(site)) for site in donor.sites & self.lens.sites)
            for name, donor in self.donors.items()
        }

    def key(self, job: JudgingJob, task: str) -> str:
        """What a result is kept under: the weights at hand, what is done to them, and what is asked."""
        done = [
            [self._donor_fingerprints.get(s.donor, ""), [str(astuple(site)) for site in s.sites]]
            for s in job.steps
        ]
        return combined(versions(), self.weights, done, self._fingerprints[task])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks on entering: the table says once what a transplant leaves behind, and what zeros do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)
        yield


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to set up a context: sources and tasks, no tensors."""

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


_loaded: list[tuple[WorkerSetup, SweepContext, ExitStack]] = []  # one at most


def judge_in_worker(setup: WorkerSetup, job: JudgingJob) -> Answers:
    """What a worker does; its model stays loaded for the next."""
    with _LOCK:
        if not _loaded or _loaded[0][0] != setup:
            while _loaded:
                _loaded.pop()[2].close()
            _loaded.append((setup, *_set_up(setup)))
        return _loaded[0][1].judge(job)


def _set_up(setup: WorkerSetup) -> tuple[SweepContext, ExitStack]:
    lens = load(
        setup.base,
        device=setup.device,
        dtype=setup.dtype,
        trust_remote_code=bool(setup.code),
        revision=setup.code or None,
    )
    base = lens.source or lens.checkpoint
    donors = {name: open_checkpoint(source, base=base) for name, source in setup.donors}
    tasks = {task.name: prepare_task(lens, task, batch_size=setup.batch_size) for task in setup.tasks}
    context = SweepContext(lens, donors, tasks)
    if context.weights != setup.weights:
        raise LensError(
            "a worker that loads the base gets other weights than those at hand; leave executor= out where a "
            "model was changed after it was loaded"
        )
    stack = ExitStack()
    stack.enter_context(remembering_senses(lens.model, lens.checkpoint, changed=setup.changed))
    return context, stack


def setup_of(context: SweepContext, *, changed: Sites) -> WorkerSetup:
    """The setup of a context; raises `LensError` for what no worker could open again."""
    lens, fix = context.lens, "leave executor= out, or give paths or hub ids"
    if lens.source is None or not lens.source.store.source:
        raise LensError(f"{lens!r} was not loaded from files, so a worker can't load it: {fix}")
    for name, donor in context.donors.items():
        if not donor.store.source:
            raise LensError(f"the {name} model is only in memory, so a worker can't open it: {fix}")
        if not opens_again(donor, lens.source):
            raise LensError(f"the {name} model was opened in a way that a worker would not know: {fix}")
    return WorkerSetup(
        base=lens.source.store.source,
        donors=tuple((name, donor.store.source) for name, donor in context.donors.items()),
        dtype=str(next(iter(lens.parameters.values())).dtype).removeprefix("torch."),
        device=str(lens.device),
        tasks=tuple(one.task for one in context.prepared.values()),
        batch_size=max(one.batch_size for one in context.prepared.values()),
        changed=changed,
        weights=context.weights,
        code=str((lens.remote_code or {}).get("revision", "")),
    )


def collect(
    context: SweepContext,
    jobs: Iterable[JudgingJob],
    *,
    needed: Collection[JudgingJob],
    executor: Any = None,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Collected:
    """Judge each model once, in order; what fails wherever it is tried is left out and told.

    Of those that are `needed`, the error is raised.
    """
    wanted = list(dict.fromkeys(jobs))
    changed = Sites(site for job in wanted for step in job.steps for site in step.sites)
    failed: dict[JudgingJob, Failed] = {}
    with ExitStack() as stack:
        kept = _Kept(context, Journal(journal) if journal is not None else None)
        stack.callback(kept.close)
        judged = {job: known for job in wanted if (known := kept.known(job)) is not None}
        left = [job for job in wanted if job not in judged]
        work = _judge_here(context, changed, stack) if executor is None else _judge_there(context, changed)
        bar = tqdm(
            total=len(wanted),
            initial=len(judged),
            unit="model",
            disable=None if progress else True,
            leave=False,
        )
        stack.enter_context(bar)
        for job, outcome in stack.enter_context(closing(execute(work, left, executor=executor))):
            if not isinstance(outcome, Failed):
                judged[job] = outcome
                kept.keep(job, outcome)
            elif job in needed:
                raise outcome.error
            else:
                failed[job] = outcome
            bar.update()
    return judged, failed


def _judge_here(context: SweepContext, changed: Sites, stack: ExitStack) -> Callable[[JudgingJob], Answers]:
    lens = context.lens
    stack.enter_context(remembering_senses(lens.model, lens.checkpoint, changed=changed))
    return context.judge


def _judge_there(context: SweepContext, changed: Sites) -> Callable[[JudgingJob], Answers]:
    return partial(judge_in_worker, setup_of(context, changed=changed))


@dataclass(frozen=True)
class _Kept:
    """Where results are kept, if anywhere."""

    context: SweepContext
    journal: Journal | None

    def known(self, job: JudgingJob) -> Answers | None:
        """What was found before, by every task that is asked."""
        if self.journal is None:
            return None
        found = {task: self.journal.found(self.context.key(job, task)) for task in job.tasks}
        known = {task: logps for task, logps in found.items() if logps is not None}
        return known if len(known) == len(found) else None

    def keep(self, job: JudgingJob, judged: Answers) -> None:
        """Keep what was found."""
        if self.journal is not None:
            self.journal.keep({self.context.key(job, task): logps for task, logps in judged.items()})

    def close(self) -> None:
        """Let go of the file."""
        if self.journal is not None:
            self.journal.close()
