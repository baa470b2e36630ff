"""The embedded pair: a small real multimodal model before and after tuning for affect, and a control.

How it was made and how good it is: `docs/demo-pair.md`. Artwork and data: `CREDITS.md` beside this file.
"""

import json
from pathlib import Path
from typing import NamedTuple

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.errors import TaskError, near
from affectlens.tasks import Task, load_task

_HERE = Path(__file__).parent


class Demo(NamedTuple):
    """The three checkpoints and the tasks: `base, tuned, control, tasks = load_demo()`."""

    base: Checkpoint
    tuned: Checkpoint  # all linear layers of the language model, on emotion and valence
    control: Checkpoint  # the same recipe on non-affective labels of the same media
    tasks: tuple[Task, ...]

    def task(self, name: str) -> Task:
        """Return a task by name; raises `TaskError` with the names there are."""
        for task in self.tasks:
            if task.name == name:
                return task
        names = [task.name for task in self.tasks]
        raise TaskError(f"the demo has no task {name!r}. Tasks: {near(name, names, most=20)}")


def load_demo() -> Demo:
    """Open the pair that comes with affectlens.

    >>> load_demo().base.config["model_type"]
    'llava'
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
