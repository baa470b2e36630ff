"""The demo pair: a small real multimodal model before and after tuning for affect, and a control tuning.

`docs/demo-pair.md` describes how it was made and what it can do; `CREDITS.md` lists artwork and data.
"""

import json
from pathlib import Path
from typing import NamedTuple

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.errors import TaskError, near
from affectlens.tasks import Task, load_task

_HERE = Path(__file__).parent


class Demo(NamedTuple):
    """The three checkpoints and the tasks that `load_demo` opens.

    >>> base, tuned, control, tasks = load_demo()
    >>> len(base.sites), [task.name for task in tasks][:2]
    (113, ['faces-unseen', 'faces-fit'])
    """

    base: Checkpoint
    tuned: Checkpoint  # all linear layers of the language model, tuned on emotion and valence
    control: Checkpoint  # the same recipe with non-affective labels of the same media
    tasks: tuple[Task, ...]

    def task(self, name: str) -> Task:
        """Return a task by its name. Raises `TaskError`, which lists the names, for another one."""
        for task in self.tasks:
            if task.name == name:
                return task
        names = [task.name for task in self.tasks]
        raise TaskError(f"the demo has no task {name!r}. Tasks: {near(name, names, most=20)}")


def load_demo() -> Demo:
    """Open the demo pair, which is part of the package.

    >>> demo = load_demo()
    >>> demo.base.config["model_type"]
    'llava'
    >>> demo.task("sentences").labels
    ('good', 'bad')
    """
    base, tuned, control = (open_checkpoint(_HERE / name) for name in ("base", "tuned", "control"))
    entries = json.loads((_HERE / "tasks" / "tasks.json").read_text("utf-8"))
    tasks = tuple(
        load_task(
            "labels",
            _HERE / "tasks" / entry["file"],
            name=name,
            labels=entry["labels"],
            prompt=entry["prompt"],
            role=entry["kind"],
            fit=entry["fit"],
            about=entry["about"],
        )
        for name, entry in entries.items()
    )
    return Demo(base, tuned, control, tasks)
