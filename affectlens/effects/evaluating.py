"""Judge a lens by a task: constrained scoring over the label words, or strict greedy answers."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.effects.journal import combined, fingerprint
from affectlens.errors import LensError, TaskError, near
from affectlens.lens import Lens, told
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

    `constrained` compares the log-probabilities of the label words after the prompt, so each example
    has a margin. Those of a label's tokens are summed, which puts longer labels at a disadvantage:
    choose labels of one length where you can.

    `greedy` lets the model write and reads its answer strictly: several labels, or none, is wrong. It
    may write `max_new_tokens`; a model that never learned to stop (the demo's) needs 1.

    Where memory runs out, batches are halved until they fit; the answers are the same.

    Raises `TaskError` for another way, `LensError` for examples the model can't take.
    """
    if batch_size < 1:
        raise TaskError(f"batch_size is a number of examples, not {batch_size}")
    if answer == "constrained":
        return to_scores(task, judge(lens, prepare_task(lens, task, batch_size=batch_size))[0])
    if answer != "greedy":
        raise TaskError(f"can't answer by {answer!r}. Ways: {near(answer, WAYS)}")
    texts: list[str] = []

    def say(size: int) -> list[str]:
        some = task.examples[len(texts) : len(texts) + size]
        return lens.generate(*some, prompt=task.prompt, max_new_tokens=max_new_tokens)

    while len(texts) < len(task):
        said, batch_size = fitting(say, batch_size, what=_named(task))
        texts += said
    frame = _frame(task, [read_answer(text, task.labels) for text in texts])
    frame["text"] = texts
    return Scores(frame, _origin(task, answer))


@dataclass(frozen=True)
class PreparedTask:
    """A task as model input, made once and run under many interventions."""

    task: Task
    batches: tuple[Mapping[str, Tensor], ...]
    labels: tuple[tuple[int, ...], ...]  # token ids of each label

    @property
    def batch_size(self) -> int:
        """Examples of the largest batch."""
        return max(map(rows, self.batches))

    @cached_property
    def fingerprint(self) -> str:
        """A print of all that the model is shown, and of what it is held to."""
        batches = [fingerprint(batch) for batch in self.batches]
        gold = [example.label for example in self.task.examples]
        return combined(batches, self.labels, self.task.labels, gold)


def prepare_task(lens: Lens, task: Task, *, batch_size: int = 32) -> PreparedTask:
    """Render, open and tokenize all examples of a task."""
    batches = tuple(
        lens.prepare(*task.examples[start : start + batch_size], prompt=task.prompt)
        for start in range(0, len(task), batch_size)
    )
    with told(f"{_named(task)}: its labels can't be tokenized"):
        labels = tuple(_label_ids(lens, label) for label in task.labels)
    _check_labels(task, labels)
    return PreparedTask(task, batches, labels)


def judge(lens: Lens, prepared: PreparedTask) -> tuple[Float[Tensor, "examples labels"], PreparedTask]:
    """The log-probability of each label, and the task in batches that fit into memory."""

    def run(size: int) -> tuple[Float[Tensor, "examples labels"], PreparedTask]:
        whole = size == prepared.batch_size
        one = prepared if whole else prepare_task(lens, prepared.task, batch_size=size)
        return label_logps(lens, one), one

    return fitting(run, prepared.batch_size, what=_named(prepared.task))[0]


def _named(task: Task) -> str:
    return f"task {task.name!r}"


def _check_labels(task: Task, labels: tuple[tuple[int, ...], ...]) -> None:
    """Refuse labels whose tokens are the beginning of another's: the shorter would win every time."""
    for i, (label, ids) in enumerate(zip(task.labels, labels, strict=True)):
        for j, other in enumerate(labels):
            if not ids or (i != j and other[: len(ids)] == ids):
                raise TaskError(
                    f"task {task.name!r}: to this tokenizer label {label!r} is not a word of its own, but "
                    f"the beginning of {task.labels[j]!r}. Try other label words"
                )


def _label_ids(lens: Lens, label: str) -> tuple[int, ...]:
    encode = lens.tokenizer.encode
    if encodes(lens.model):
        return _decoded(lens, encode(label))
    if getattr(lens.processor, "chat_template", None):
        # After a chat template's cue the answer begins at once.
        return tuple(encode(label, add_special_tokens=False))
    # After bare text it is a new word, which some tokenizers spell otherwise than a text's first one.
    before, after = (encode(text, add_special_tokens=False) for text in ("a", f"a {label}"))
    return tuple(after[len(before) :] if after[: len(before)] == before else encode(f" {label}"))


def _decoded(lens: Lens, ids: list[int]) -> tuple[int, ...]:
    """What a decoder is taught to say: a text with the marks around it, less where it begins and ends."""
    if ids and ids[-1] == lens.tokenizer.eos_token_id:
        ids = ids[:-1]
    return tuple(ids[1:] if ids and ids[0] == begins(lens.model) else ids)


def label_logps(lens: Lens, prepared: PreparedTask) -> Float[Tensor, "examples labels"]:
    """The log-probability of each label as the answer to each example, in float32."""
    found = torch.cat([_batch_logps(lens, batch, prepared.labels) for batch in prepared.batches])
    if torch.isnan(found).any():
        raise LensError(f"task {prepared.task.name!r}: the model's logits hold NaN, so nothing can be judged")
    return found


def _batch_logps(
    lens: Lens, batch: Mapping[str, Tensor], labels: tuple[tuple[int, ...], ...]
) -> Float[Tensor, "batch labels"]:
    if all(len(ids) == 1 for ids in labels):
        logps = lens.run(batch)[:, -1].log_softmax(-1)
        return logps[:, [ids[0] for ids in labels]].cpu()
    return torch.stack([_sequence_logp(lens, batch, ids) for ids in labels], dim=1).cpu()


def _sequence_logp(lens: Lens, batch: Mapping[str, Tensor], ids: tuple[int, ...]) -> Float[Tensor, " batch"]:
    """Run prompt and label together; the k label tokens are predicted at the k positions before the last."""
    answer = torch.tensor(ids, device=lens.device)
    longer = continued(batch, answer)
    logps = lens.run(longer, last=len(ids) + 1, answer=len(ids))[:, :-1].log_softmax(-1)
    said = answer.to(logps.device).expand(len(logps), -1).unsqueeze(-1)
    return logps.gather(-1, said).squeeze(-1).sum(1)


def to_scores(task: Task, logps: Float[Tensor, "examples labels"]) -> Scores:
    """Turn label log-probabilities into scores."""
    found = logps.double().numpy()
    gold = np.array([task.labels.index(example.label) for example in task.examples])
    frame = _frame(task, [task.labels[i] for i in found.argmax(1)])
    frame["logp"] = found[np.arange(len(gold)), gold]
    for metric in METRICS.values():
        if metric.of is not None:
            frame[metric.column] = metric.of(found, gold)
    return Scores(frame, _origin(task, "constrained"))


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


def describe(task: Task) -> dict[str, Any]:
    """What a result says of its task."""
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
    """Run with a batch size, or with half of it as often as memory runs out; returns the size that fitted.

    Raises `LensError` where even one example is too much.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise LensError(
                    f"{what}: even one example at a time needs more memory than there is"
                ) from None
        # Only here, where the error and with it the frames of the failed run are gone.
        size //= 2
        _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
