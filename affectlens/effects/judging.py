"""Judge edited models, here or in a worker process, and keep what was found in a journal.

    JudgingJob (weight changes, tasks) ── collect ──▶ journal, or
        SweepContext.judge: base with the changes ──▶ Answers (log-probabilities of the labels, by task)

A worker is given a WorkerSetup (paths, keys, no tensors) and builds its own SweepContext from it.
"""

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.checkpoints.adapters.attached import adapter_layers, adapter_state
from affectlens.checkpoints.opening import opens_again
from affectlens.effects.caching import remembering_senses
from affectlens.effects.evaluating import PreparedTask, judge, prepare_task
from affectlens.effects.journal import Journal, combined, fingerprint
from affectlens.errors import LensError, Remark
from affectlens.executing import Failed, execute
from affectlens.interventions import Transplant, Zero
from affectlens.lens import Intervention, Lens, load
from affectlens.progress import shown
from affectlens.sites import Sites
from affectlens.table import versions
from affectlens.tasks import Task

Answers = dict[str, Float[np.ndarray, "examples labels"]]  # log-probabilities of the labels, by task


class WeightChange(NamedTuple):
    """One change of weights at some sites: the donor's weights, or zeros without a donor."""

    sites: Sites
    donor: str = ""


class JudgingJob(NamedTuple):
    """A model to judge: base after some weight changes, and the names of the tasks."""

    steps: tuple[WeightChange, ...]
    tasks: tuple[str, ...]


Collected = tuple[dict[JudgingJob, Answers], dict[JudgingJob, Failed]]


@dataclass
class SweepContext:
    """A live base, with donors and tasks by name; the batches of a task shrink until they fit into memory."""

    lens: Lens
    donors: Mapping[str, Checkpoint]
    prepared: dict[str, PreparedTask]

    def __post_init__(self) -> None:
        # Taken before any batch is halved: a key must not depend on how much memory was free.
        self._fingerprints = {name: one.fingerprint for name, one in self.prepared.items()}

    def judge(self, job: JudgingJob) -> Answers:
        """Return the log-probabilities of the labels, in float32, and leave the model as it was."""
        found: Answers = {}
        with _without_remarks(), self.lens.intervene(*map(self._intervention, job.steps)):
            for name in job.tasks:
                logps, self.prepared[name] = judge(self.lens, self.prepared[name])
                found[name] = logps.numpy()
        return found

    def key(self, job: JudgingJob, task: str) -> str:
        """Return the journal key of a result: the live weights, the changes made to them, and the task.

        Journals on disk hold these keys: a change here makes a resumed sweep judge every model again.
        """
        changes = [
            [self._donor_fingerprints.get(step.donor, ""), [str(astuple(site)) for site in step.sites]]
            for step in job.steps
        ]
        return combined(versions(), self.weights, changes, self._fingerprints[task])

    @cached_property
    def weights(self) -> str:
        """A fingerprint of the live weights, the config and the kind of device."""
        config: Any = getattr(self.lens.model, "config", None)
        settings = config.to_json_string() if hasattr(config, "to_json_string") else ""
        # Journals of models without adapters stay valid.
        layers = [[name, str(adapter_state(layer))] for name, layer in adapter_layers(self.lens.model)]
        adapters = [[layers, self.lens.adapters_off]] if layers else []
        return combined(fingerprint(self.lens.parameters), settings, self.lens.device.type, *adapters)

    @cached_property
    def _donor_fingerprints(self) -> dict[str, str]:
        return {
            name: fingerprint((site.parameter, donor.read(site)) for site in donor.sites & self.lens.sites)
            for name, donor in self.donors.items()
        }

    def _intervention(self, step: WeightChange) -> Intervention:
        return Transplant(step.sites, donor=self.donors[step.donor]) if step.donor else Zero(step.sites)


@dataclass(frozen=True)
class WorkerSetup:
    """The sources and settings that a worker builds its context from; no tensors."""

    base: str
    donors: tuple[tuple[str, str], ...]  # name, source
    dtype: str
    device: str
    tasks: tuple[Task, ...]
    batch_size: int
    changed: Sites
    weights: str  # the fingerprint that the worker's own base must have
    asked: Mapping[str, Any]  # how prompts are written: fields of PromptFormat
    prompts: tuple[str, ...]  # fingerprints of the prompts that the worker's own must have, by task
    code: str = ""  # the revision of the model's own code, where that was allowed to run


def collect(
    context: SweepContext,
    jobs: Iterable[JudgingJob],
    *,
    needed: Collection[JudgingJob],
    executor: Any = None,
    journal: str | Path | None = None,
    begin: Callable[[Collection[JudgingJob]], object] | None = None,
) -> Collected:
    """Judge each model once, in order; return the answers, and the jobs that failed however often tried.

    `begin` is called with the jobs that no journal holds; without it no progress is shown. Raises the error
    of a job that fails if it is one of the `needed`, and `JournalError`.
    """
    wanted = list(dict.fromkeys(jobs))  # two units can be one model, e.g. the only group and the whole change
    changed = Sites(site for job in wanted for step in job.steps for site in step.sites)
    failed: dict[JudgingJob, Failed] = {}
    with ExitStack() as stack:
        kept = _KeptAnswers(context, Journal(journal) if journal is not None else None)
        stack.callback(kept.close)
        judged = {job: known for job in wanted if (known := kept.find(job)) is not None}
        left = [job for job in wanted if job not in judged]
        if begin is not None:
            begin(left)
        stack.enter_context(_telling_what_is_kept(kept, judged, len(wanted)))
        work = _here(context, changed, stack) if executor is None else _in_workers(context, changed)
        bar = shown(len(wanted), unit="model", what="sweep", initial=len(judged), show=begin is not None)
        step = stack.enter_context(bar)
        # Closed on an error too, which cancels the jobs that workers have not begun.
        for job, outcome in stack.enter_context(closing(execute(work, left, executor=executor))):
            if not isinstance(outcome, Failed):
                judged[job] = outcome
                kept.keep(job, outcome)
            elif job in needed:
                raise outcome.error
            else:
                failed[job] = outcome
            step(1)
    return judged, failed


@contextmanager
def _telling_what_is_kept(kept: "_KeptAnswers", judged: Collection[JudgingJob], total: int) -> Iterator[None]:
    """Add to an interrupt how much is done, and whether the same sweep goes on from there."""
    try:
        yield
    except KeyboardInterrupt as stop:
        count = f"{len(judged)} of {total} models"
        if kept.journal is None:
            stop.add_note(
                f"{count} were judged and none is kept; a sweep with a journal would go on from there"
            )
        else:
            stop.add_note(f"{count} are kept in {kept.journal.path}; the same sweep goes on from there")
        raise


def _here(context: SweepContext, changed: Sites, stack: ExitStack) -> Callable[[JudgingJob], Answers]:
    lens = context.lens
    stack.enter_context(remembering_senses(lens.model, lens.checkpoint, changed=changed))
    return context.judge


def _in_workers(context: SweepContext, changed: Sites) -> Callable[[JudgingJob], Answers]:
    return partial(judge_in_worker, worker_setup(context, changed=changed))


@dataclass(frozen=True)
class _KeptAnswers:
    """The answers in the journal, if there is one."""

    context: SweepContext
    journal: Journal | None

    def find(self, job: JudgingJob) -> Answers | None:
        """Return the answers to all tasks of a job; None if one is missing."""
        if self.journal is None:
            return None
        found = {task: self.journal.found(self.context.key(job, task)) for task in job.tasks}
        known = {task: logps for task, logps in found.items() if logps is not None}
        return known if len(known) == len(found) else None

    def keep(self, job: JudgingJob, answers: Answers) -> None:
        """Write the answers to all tasks of a job."""
        if self.journal is not None:
            self.journal.keep({self.context.key(job, task): logps for task, logps in answers.items()})

    def close(self) -> None:
        """Close the journal."""
        if self.journal is not None:
            self.journal.close()


def worker_setup(context: SweepContext, *, changed: Sites) -> WorkerSetup:
    """Return what a worker needs; raises `LensError` for a base or donor that it could not open."""
    lens, fix = context.lens, "Leave executor= out, or give paths or hub ids"
    if lens.source is None or not lens.source.store.source:
        raise LensError(f"{lens!r} was not loaded from files, so a worker can't load it. {fix}")
    for name, donor in context.donors.items():
        if not donor.store.source:
            raise LensError(f"the {name} model is only in memory, so a worker can't open it. {fix}")
        if not opens_again(donor, lens.source):
            raise LensError(
                f"the {name} model was opened with a base or an alpha that a worker would not know. {fix}"
            )
    return WorkerSetup(
        base=lens.source.store.source,
        donors=tuple((name, donor.store.source) for name, donor in context.donors.items()),
        dtype=str(next(iter(lens.parameters.values())).dtype).removeprefix("torch."),
        device=str(lens.device),
        tasks=tuple(one.task for one in context.prepared.values()),
        batch_size=max(one.batch_size for one in context.prepared.values()),
        changed=changed,
        weights=context.weights,
        asked=_asked(context),
        prompts=tuple(one.prompts for one in context.prepared.values()),
        code=str((lens.remote_code or {}).get("revision", "")),
    )


def _asked(context: SweepContext) -> Mapping[str, Any]:
    form = next((one.form for one in context.prepared.values()), None)
    return {} if form is None else {"options": form.options, "cue": form.cue, "template": form.used}


_LOCK = threading.Lock()  # weights are swapped in place, so threads of one process take turns
_loaded: list[tuple[WorkerSetup, SweepContext, ExitStack]] = []  # one at most


def judge_in_worker(setup: WorkerSetup, job: JudgingJob) -> Answers:
    """Judge one model in a worker, whose base stays loaded for the next job of the same setup."""
    with _LOCK:
        if not _loaded or _loaded[0][0] != setup:
            while _loaded:
                _loaded.pop()[2].close()
            _loaded.append((setup, *_built(setup)))
        return _loaded[0][1].judge(job)


def _built(setup: WorkerSetup) -> tuple[SweepContext, ExitStack]:
    lens = load(
        setup.base,
        device=setup.device,
        dtype=setup.dtype,
        trust_remote_code=bool(setup.code),
        revision=setup.code or None,
    )
    base = lens.source or lens.checkpoint
    donors = {name: open_checkpoint(source, base=base) for name, source in setup.donors}
    form = replace(lens.prompt_format, **setup.asked) if setup.tasks else None
    size = setup.batch_size
    tasks = {task.name: prepare_task(lens, task, batch_size=size, form=form) for task in setup.tasks}
    context = SweepContext(lens, donors, tasks)
    found = {"weights": context.weights, "prompts": tuple(one.prompts for one in tasks.values())}
    for what, one in found.items():
        if one != getattr(setup, what):
            raise LensError(
                f"a worker that loads the base from its files gets other {what} than this lens has. "
                "Leave executor= out for a model that was changed after it was loaded"
            )
    stack = ExitStack()
    stack.enter_context(remembering_senses(lens.model, lens.checkpoint, changed=setup.changed))
    return context, stack


@contextmanager
def _without_remarks() -> Iterator[None]:
    # The table says once what a transplant leaves behind and what zeros delete; here each model would.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)
        yield
