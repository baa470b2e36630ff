"""A task: examples, the closed set of their labels, and the prompt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from affectlens.errors import TaskError, near, warn
from affectlens.tasks.example_files import read_examples
from affectlens.tasks.examples import Example
from affectlens.tasks.written_answers import alike

# kind → prompt. `labels` adds no question to the text.
KINDS = {
    "emotion-labels": "{text} Which emotion is this? Answer with one word of: {labels}.",
    "valence": "{text} Is this positive or negative? Answer with one word of: {labels}.",
    "labels": "{text}",
}
ROLES = ("affective", "control", "neutral")


@dataclass(frozen=True)
class Task:
    """Examples, and how they are judged.

    `role` is the task's part in a study: `affective` (what the tuning was for), `control` (what a control
    tuning was for) or `neutral` (what base could do before). `fit` marks examples that the tuned model was
    trained on. Raises `TaskError` for examples that can't be judged by the labels.

    >>> examples = (Example("1", "happy", text="Yes!"), Example("2", "sad", text="Oh no."))
    >>> Task("words", examples, labels=("happy", "sad"), prompt="{text} I feel")
    Task('words': 2 examples, 2 labels, majority 0.50, affective)
    """

    name: str
    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    prompt: str = "{text}"
    role: str = "affective"
    fit: bool = False
    about: str = ""
    dropped: int = 0  # the number of examples left out because they have no usable label

    def __post_init__(self) -> None:
        if not self.examples:
            raise TaskError(f"task {self.name!r} has no examples")
        if len(self.labels) < 2:
            raise TaskError(f"task {self.name!r} needs at least two labels, got {self.labels}")
        if self.role not in ROLES:
            raise TaskError(f"unknown role={self.role!r} of a task. Roles: {near(self.role, ROLES)}")
        ids = Counter(example.id for example in self.examples)
        twice, count = ids.most_common(1)[0]
        if count > 1:
            raise TaskError(f"task {self.name!r} has {count} examples with the id {twice!r}")
        stray = sorted({example.label for example in self.examples} - set(self.labels))
        if stray:
            raise TaskError(
                f"task {self.name!r}: the labels {stray[:5]} of its examples are not among {self.labels}"
            )
        for one, other in alike(self.labels):
            warn(
                f"task {self.name!r}: the labels {one!r} and {other!r} differ only in case, spaces or "
                "Unicode form, and count as two; if they are one, give the examples one spelling"
            )

    @property
    def majority(self) -> float:
        """The accuracy of always answering with the most frequent label."""
        counts = Counter(example.label for example in self.examples)
        return counts.most_common(1)[0][1] / len(self.examples)

    def head(self, count: int) -> "Task":
        """Return the task with its first `count` examples."""
        return replace(self, examples=self.examples[:count])

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        fit = ", trained on" if self.fit else ""
        return (
            f"Task({self.name!r}: {len(self)} examples{fit}, {len(self.labels)} labels, majority "
            f"{self.majority:.2f}, {self.role})"
        )

    def _repr_html_(self) -> str:
        from affectlens.tasks.gallery import gallery  # opens pictures, which a task itself never does

        return gallery(repr(self), self.examples, prompt=self.prompt)


def load_task(
    kind: str,
    path: str | Path,
    *,
    name: str = "",
    labels: Sequence[str] = (),
    prompt: str = "",
    role: str = "affective",
    fit: bool = False,
    about: str = "",
) -> Task:
    """Load a task from JSON lines, a JSON array or a CSV table, whose fields are those of `Example`.

    `kind` is `emotion-labels`, `valence` or `labels`. It gives the prompt unless `prompt` is given;
    `{text}` and `{labels}` are filled in. `labels` defaults to the labels in the file. Examples whose label
    is empty or NaN are dropped and counted. Under `valence` a number becomes its sign, and zeros are dropped.
    Raises `TaskError`.

    >>> from tempfile import TemporaryDirectory
    >>> lines = '{"id": 1, "text": "Yes!", "label": 0.8}\\n{"id": 2, "text": "Oh no.", "label": -1}'
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "words.jsonl")
    ...     _ = file.write_text(lines)
    ...     load_task("valence", file)
    Task('words': 2 examples, 2 labels, majority 0.50, affective)
    """
    if kind not in KINDS:
        raise TaskError(f"unknown kind of task {kind!r}. Kinds: {near(kind, KINDS)}")
    file = Path(path)
    examples = read_examples(file)
    kept = map(_signed, examples) if kind == "valence" else examples
    judged = tuple(example for example in kept if example is not None and example.label)
    found = tuple(labels) or tuple(sorted({example.label for example in judged}))
    return Task(
        name=name or file.stem,
        examples=judged,
        labels=found,
        prompt=(prompt or KINDS[kind]).replace("{labels}", ", ".join(found)),
        role=role,
        fit=fit,
        about=about,
        dropped=len(examples) - len(judged),
    )


def _signed(example: Example) -> Example | None:
    try:
        value = float(example.label)
    except ValueError:
        return example
    if not value or value != value:
        return None
    return replace(example, label="positive" if value > 0 else "negative")
