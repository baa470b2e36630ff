"""Judge a lens by a task: score the label words, or read the greedy answer strictly.

    Task ── prepare_task ──▶ PreparedTask (batches, label tokens) ── judge ──▶ log-probabilities
         ── to_scores ──▶ Scores

Where memory runs out, `fitting` halves the batch until it fits.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.effects.journal import combined, fingerprint
from affectlens.errors import LensError, TaskError, near
from affectlens.lens import Lens, told
from affectlens.lens.inputs.batching import batches
from affectlens.lens.live import encodes
from affectlens.lens.running import begins, continued, out_of_memory, rows
from affectlens.table import provenance
from affectlens.tasks import METRICS, Scores, Task, read_answer

WAYS = ("constrained", "greedy")
Result = TypeVar("Result")


def evaluate(
    lens: Lens, task: Task, *, answer: str = "constrained", batch_size: int = 32, max_new_tokens: int = 8
) -> Scores:
    """Let the model answer every example of a task.

    `answer="constrained"` compares the log-probabilities of the label words after the prompt, so each
    example has a margin. The log-probabilities of a label's tokens are summed, which puts longer labels at a
    disadvantage: choose labels of equal length where you can.

    `answer="greedy"` lets the model write up to `max_new_tokens` and reads the text strictly: several
    labels, or none, count as wrong. A model that never learned to stop (the demo's) needs 1 token.

    When memory runs out, the batch size is halved until it fits; the answers stay the same.

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
    if answer == "constrained":
        return to_scores(task, judge(lens, prepare_task(lens, task, batch_size=batch_size))[0])
    if answer != "greedy":
        raise TaskError(f"unknown answer={answer!r}. Known: {near(answer, WAYS)}")
    texts: list[str] = []

    def write(size: int) -> list[str]:
        some = task.examples[len(texts) : len(texts) + size]
        return lens.generate(*some, prompt=task.prompt, max_new_tokens=max_new_tokens)

    while len(texts) < len(task):
        written, batch_size = fitting(write, batch_size, what=_named(task))
        texts += written
    frame = _frame(task, [read_answer(text, task.labels) for text in texts])
    frame["text"] = texts
    return Scores(frame, _origin(task, answer))


@dataclass(frozen=True)
class PreparedTask:
    """A task as model input: prepared once, run under many interventions."""

    task: Task
    batches: tuple[Mapping[str, Tensor], ...]
    labels: tuple[tuple[int, ...], ...]  # token ids of each label
    # The number of the example in each row of the batches; without it, they are as the task lists them.
    order: tuple[int, ...] = ()

    @property
    def batch_size(self) -> int:
        """The number of examples in the largest batch."""
        return max(map(rows, self.batches))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's inputs, the label tokens, the labels and the gold labels."""
        batches = [fingerprint(batch) for batch in self.batches]
        gold = [example.label for example in self.task.examples]
        return combined(batches, self.labels, self.task.labels, gold)


def prepare_task(lens: Lens, task: Task, *, batch_size: int = 32) -> PreparedTask:
    """Render and tokenize all examples of a task, and open their media.

    Raises `TaskError` for labels that the tokenizer can't tell apart.
    """
    make = partial(lens.prepare, prompt=task.prompt)
    parts = list(batches(lens, task.examples, make=make, tensors=dict, size=batch_size))
    with told(f"{_named(task)}: its labels can't be tokenized"):
        labels = tuple(_label_ids(lens, label) for label in task.labels)
    _check_labels(task, labels)
    order = tuple(number for numbers, _ in parts for number in numbers)
    return PreparedTask(task, tuple(batch for _, batch in parts), labels, order)


def judge(lens: Lens, prepared: PreparedTask) -> tuple[Float[Tensor, "examples labels"], PreparedTask]:
    """Return the log-probability of each label, and the task in batches that fit into memory."""

    def run(size: int) -> tuple[Float[Tensor, "examples labels"], PreparedTask]:
        whole = size == prepared.batch_size
        one = prepared if whole else prepare_task(lens, prepared.task, batch_size=size)
        return label_logps(lens, one), one

    return fitting(run, prepared.batch_size, what=_named(prepared.task))[0]


def label_logps(lens: Lens, prepared: PreparedTask) -> Float[Tensor, "examples labels"]:
    """Return the log-probability of each label as the answer to each example, in float32.

    Raises `LensError` where the logits hold NaN: the argmax would be the first label, which may be gold.
    """
    found = torch.cat([_batch_logps(lens, batch, prepared.labels) for batch in prepared.batches])
    if prepared.order:
        found = found[torch.tensor(prepared.order).argsort()]
    if torch.isnan(found).any():
        raise LensError(
            f"task {prepared.task.name!r}: the model's logits hold NaN, so its answers can't be compared"
        )
    return found


def to_scores(task: Task, logps: Float[Tensor, "examples labels"]) -> Scores:
    """Turn label log-probabilities into scores."""
    found = logps.double().numpy()
    gold = np.array([task.labels.index(example.label) for example in task.examples])
    frame = _frame(task, [task.labels[i] for i in found.argmax(1)])
    frame["logp"] = found[np.arange(len(gold)), gold]
    for metric in METRICS.values():
        if metric.of is not None:
            values = metric.of(found, gold)
            frame[metric.column] = values.astype(int) if metric.counts(values) else values
    return Scores(frame, _origin(task, "constrained"))


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


def fitting(run: Callable[[int], Result], size: int, *, what: str) -> tuple[Result, int]:
    """Run with a batch size, halved each time memory runs out; return the result and the size that fitted.

    Raises `LensError` where even one example does not fit.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise LensError(f"{what}: not enough memory for even one example") from None
        # Outside `except`: the error keeps the frames of the failed run, and with them its tensors, alive.
        size //= 2
        _free_memory()


def _named(task: Task) -> str:
    return f"task {task.name!r}"


def _check_labels(task: Task, labels: tuple[tuple[int, ...], ...]) -> None:
    """Refuse a label whose tokens begin another label's: the shorter one would win every time."""
    for i, (label, ids) in enumerate(zip(task.labels, labels, strict=True)):
        for j, other in enumerate(labels):
            if not ids or (i != j and other[: len(ids)] == ids):
                raise TaskError(
                    f"task {task.name!r}: the tokens of label {label!r} are the beginning of those of "
                    f"{task.labels[j]!r}, so the two can't be compared. Use other label words"
                )


def _label_ids(lens: Lens, label: str) -> tuple[int, ...]:
    encode = lens.tokenizer.encode
    if encodes(lens.model):
        return _decoded(lens, encode(label))
    if getattr(lens.processor, "chat_template", None):
        # The chat template ends in the cue, so the answer begins without a space.
        return tuple(encode(label, add_special_tokens=False))
    # After bare text the label is a new word; some tokenizers encode it differently from the first word.
    before, after = (encode(text, add_special_tokens=False) for text in ("a", f"a {label}"))
    return tuple(after[len(before) :] if after[: len(before)] == before else encode(f" {label}"))


def _decoded(lens: Lens, ids: list[int]) -> tuple[int, ...]:
    """Strip the tokens that begin and end a text: a decoder is trained to write only what is between."""
    if ids and ids[-1] == lens.tokenizer.eos_token_id:
        ids = ids[:-1]
    return tuple(ids[1:] if ids and ids[0] == begins(lens.model) else ids)


def _batch_logps(
    lens: Lens, batch: Mapping[str, Tensor], labels: tuple[tuple[int, ...], ...]
) -> Float[Tensor, "batch labels"]:
    # One pass gives the next token's probability for all labels; longer ones need a pass each.
    if all(len(ids) == 1 for ids in labels):
        logps = lens.run(batch)[:, -1].log_softmax(-1)
        return logps[:, [ids[0] for ids in labels]].cpu()
    return torch.stack([_sequence_logp(lens, batch, ids) for ids in labels], dim=1).cpu()


def _sequence_logp(lens: Lens, batch: Mapping[str, Tensor], ids: tuple[int, ...]) -> Float[Tensor, " batch"]:
    """Run prompt and label together; the k positions before the last predict the k label tokens."""
    answer = torch.tensor(ids, device=lens.device)
    longer = continued(batch, answer)
    logps = lens.run(longer, last=len(ids) + 1, answer=len(ids))[:, :-1].log_softmax(-1)
    tokens = answer.to(logps.device).expand(len(logps), -1).unsqueeze(-1)
    return logps.gather(-1, tokens).squeeze(-1).sum(1)


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


def _origin(task: Task, answer: str) -> dict[str, Any]:
    return {"task": describe(task), "answer": answer, **provenance()}


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
