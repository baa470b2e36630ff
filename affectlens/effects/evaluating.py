"""Judge a lens by a task: score the label words, or read the greedy answer strictly.

    Task ── prepare_task ──▶ PreparedTask (batches, label tokens) ── judge ──▶ log-probabilities
         ── to_scores ──▶ Scores

Where memory runs out, the batch is halved until it fits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.effects.journal import combined, fingerprint
from affectlens.effects.prompting import PromptOf, asked_as, describe_prompts
from affectlens.errors import LensError, TaskError, near
from affectlens.lens import Lens, told
from affectlens.lens.asking import ask
from affectlens.lens.holding import Running
from affectlens.lens.inputs.batching import batches
from affectlens.lens.inputs.choices import Choices
from affectlens.lens.inputs.prompt_format import PromptFormat
from affectlens.lens.inputs.tokens import Ids
from affectlens.lens.memory_use import fitting
from affectlens.lens.scoring import label_logps as scored
from affectlens.progress import Step, shown
from affectlens.table import provenance
from affectlens.tasks import METRICS, Example, Scores, Task, read_answer

WAYS = ("constrained", "greedy")


def evaluate(
    lens: Lens,
    task: Task,
    *,
    answer: str = "constrained",
    batch_size: int = 32,
    max_new_tokens: int = 8,
    prompt_of: PromptOf = "base",
    progress: bool = True,
) -> Scores:
    """Let the model answer every example of a task.

    `answer="constrained"` compares the log-probabilities of the label words after the prompt, so each
    example has a margin. The log-probabilities of a label's tokens are summed, which puts longer labels at a
    disadvantage: choose labels of equal length where you can.

    `answer="greedy"` lets the model write up to `max_new_tokens` and reads the text strictly: several
    labels, or none, count as wrong. A model that never learned to stop (the demo's) needs 1 token.

    When memory runs out, the batch size is halved until it fits; the answers stay the same.

    `prompt_of` is whose chat template asks: `"base"`, the lens's own, or the path or lens of another model.

    Raises `TaskError` for another `answer` and for labels that the tokenizer can't tell apart, `LensError`
    for examples that the model can't take.

    >>> import affectlens as al
    >>> base, *_, tasks = al.load_demo()
    >>> lens = al.load(base, dtype="float32")
    >>> scores = al.evaluate(lens, tasks[0].head(8))
    >>> scores.metrics, len(scores)
    (('accuracy', 'margin'), 8)
    """
    if batch_size < 1:
        raise TaskError(f"batch_size must be 1 or more, got {batch_size}")
    lens = asked_as(lens, prompt_of)
    if answer == "constrained":
        prepared = prepare_task(lens, task, batch_size=batch_size, progress=progress)
        with shown(len(task), unit="example", what=f"evaluate {task.name}", show=progress) as step:
            logps, _ = judge(lens, prepared, tell=step)
        return to_scores(task, logps, form=prepared.form)
    if answer != "greedy":
        raise TaskError(f"unknown answer={answer!r}. Known: {near(answer, WAYS)}")
    texts: list[str] = []

    def write(size: int) -> list[str]:
        some = task.examples[len(texts) : len(texts) + size]
        return lens.generate(*some, prompt=task.prompt, max_new_tokens=max_new_tokens)

    with shown(len(task), unit="example", what=f"evaluate {task.name}", show=progress) as step:
        while len(texts) < len(task):
            written, batch_size = fitting(write, batch_size, what=_named(task))
            texts += written
            step(len(written))
    frame = _frame(task, [read_answer(text, task.labels) for text in texts])
    frame["text"] = texts
    return Scores(frame, _origin(task, answer, form=lens.prompt_format))


@dataclass(frozen=True)
class PreparedTask:
    """A task as model input: prepared once, run under many interventions."""

    task: Task
    choices: tuple[Choices, ...]  # batch by batch
    order: tuple[int, ...]  # which example each row of the batches is
    form: PromptFormat

    @property
    def batches(self) -> tuple[Mapping[str, Tensor], ...]:
        """The prompts as model input."""
        return tuple(one.batch for one in self.choices)

    @property
    def batch_size(self) -> int:
        """The number of examples in the largest batch."""
        return max(len(one.labels) for one in self.choices)

    @property
    def labels(self) -> tuple[Ids, ...]:
        """The token ids of each label behind the first prompt, which are mostly those behind all."""
        return self.choices[0].labels[0]

    @property
    def by_row(self) -> tuple[tuple[Ids, ...], ...]:
        """The token ids of each label behind each prompt: its end may merge with a label."""
        return tuple(row for one in self.choices for row in one.labels)

    @cached_property
    def prompts(self) -> str:
        """A hash of the tokens of prompts and labels, which are the same on every machine."""
        whole = [
            {name: values for name, values in batch.items() if not values.is_floating_point()}
            for batch in self.batches
        ]
        return combined([fingerprint(batch) for batch in whole], self.by_row)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's inputs, the label tokens, the labels and the gold labels."""
        batches = [fingerprint(batch) for batch in self.batches]
        gold = [example.label for example in self.task.examples]
        # Labels that are the same in all rows are hashed once, as journals on disk have them.
        labels = self.by_row if len(set(self.by_row)) > 1 else self.labels
        return combined(batches, labels, self.task.labels, gold)


def prepare_task(
    lens: Lens,
    task: Task,
    *,
    batch_size: int = 32,
    form: PromptFormat | None = None,
    progress: bool = False,
) -> PreparedTask:
    """Render and tokenize all examples of a task with its labels, and open their media.

    Prompts are written as `form` writes them, by default as the lens's own template does. Raises `TaskError`
    for labels that the tokenizer can't tell apart.
    """
    form = form or lens.prompt_format

    def make(*some: Example) -> Choices:
        with told(f"{_named(task)}: its labels can't be tokenized"):
            return ask(lens, some, labels=task.labels, prompt=task.prompt, form=form)

    parts = []
    with shown(len(task), unit="example", what=f"prepare {task.name}", show=progress) as step:
        for part in batches(lens, task.examples, make=make, tensors=_batch, size=batch_size):
            parts.append(part)
            step(len(part[0]))
    prepared = PreparedTask(
        task,
        choices=tuple(found for _, found in parts),
        order=tuple(number for numbers, _ in parts for number in numbers),
        form=form,
    )
    for labels in dict.fromkeys(prepared.by_row):
        _check_labels(task, labels)
    return prepared


def _batch(found: Choices) -> Mapping[str, Tensor]:
    return found.batch


def judge(
    lens: Lens, prepared: PreparedTask, *, tell: Step = lambda number: None
) -> tuple[Float[Tensor, "examples labels"], PreparedTask]:
    """Return the log-probability of each label, and the task in batches that fit into memory.

    `tell` is given the number of examples of each batch that is done.
    """

    def run(size: int) -> tuple[Float[Tensor, "examples labels"], PreparedTask]:
        whole = size == prepared.batch_size
        one = prepared if whole else prepare_task(lens, prepared.task, batch_size=size, form=prepared.form)
        return label_logps(lens, one, tell=tell), one

    return fitting(run, prepared.batch_size, what=_named(prepared.task))[0]


def label_logps(
    lens: Lens, prepared: PreparedTask, *, tell: Step = lambda number: None
) -> Float[Tensor, "examples labels"]:
    """Return the log-probability of each label as the answer to each example, in float32.

    Raises `LensError` where the logits hold NaN: the argmax would be the first label, which may be gold.
    """
    parts = []
    with Running(lens):
        for one in prepared.choices:
            parts.append(scored(lens.model, one))
            tell(len(one.labels))
    found = torch.cat(parts)[torch.tensor(prepared.order).argsort()]
    if torch.isnan(found).any():
        raise LensError(
            f"task {prepared.task.name!r}: the model's logits hold NaN, so its answers can't be compared"
        )
    return found


def to_scores(
    task: Task, logps: Float[Tensor, "examples labels"], *, form: PromptFormat | None = None
) -> Scores:
    """Turn label log-probabilities into scores."""
    found = logps.double().numpy()
    gold = np.array([task.labels.index(example.label) for example in task.examples])
    frame = _frame(task, [task.labels[i] for i in found.argmax(1)])
    frame["logp"] = found[np.arange(len(gold)), gold]
    for metric in METRICS.values():
        if metric.of is not None:
            values = metric.of(found, gold)
            frame[metric.column] = values.astype(int) if metric.counts(values) else values
    return Scores(frame, _origin(task, "constrained", form=form))


def describe(task: Task) -> dict[str, Any]:
    """Return what a result states about its task."""
    return {
        "name": task.name,
        "n": len(task),
        "clusters": len({example.cluster for example in task.examples}),
        "majority": task.majority,
        "labels": list(task.labels),
        "kind": task.role,
        "fit": task.fit,
        "about": task.about,
        "dropped": task.dropped,
    }


def _named(task: Task) -> str:
    return f"task {task.name!r}"


def _check_labels(task: Task, labels: tuple[Ids, ...]) -> None:
    """Refuse a label whose tokens begin another label's: the shorter one would win every time."""
    for i, (label, ids) in enumerate(zip(task.labels, labels, strict=True)):
        for j, other in enumerate(labels):
            if not ids or (i != j and other[: len(ids)] == ids):
                raise TaskError(
                    f"task {task.name!r}: the tokens of label {label!r} are the beginning of those of "
                    f"{task.labels[j]!r}, so the two can't be compared. Use other label words"
                )


def _frame(task: Task, predictions: list[str | None] | list[str]) -> pd.DataFrame:
    examples = task.examples
    return pd.DataFrame(
        {
            "id": [example.id for example in examples],
            "cluster": [example.cluster for example in examples],
            "label": [example.label for example in examples],
            "prediction": predictions,
            "correct": [int(p == e.label) for p, e in zip(predictions, examples, strict=True)],
        }
    )


def _origin(task: Task, answer: str, *, form: PromptFormat | None) -> dict[str, Any]:
    asked = {} if form is None else {"prompts": describe_prompts(form, task)}
    return {"task": describe(task), "answer": answer, **asked, **provenance()}
