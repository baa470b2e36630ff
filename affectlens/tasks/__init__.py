"""JUDGED BY: examples, tasks, their media, and scores; no model is known here.

    a file of JSON lines ── examples ──▶ Example ── task ──▶ Task (examples, labels, prompt)
    the files it names ── pictures, sounds, films ──▶ pictures, sounds, frames
    a model's answers ── written_answers.read_answer ──▶ Scores, whose metrics are the rows of scores.METRICS

Names are resolved when first used: a task is read without pandas, Pillow or torch.
"""

from typing import TYPE_CHECKING

from affectlens.lazy import resolver

if TYPE_CHECKING:
    from affectlens.tasks.examples import Example
    from affectlens.tasks.films import open_film
    from affectlens.tasks.pictures import open_picture
    from affectlens.tasks.scores import METRICS, Scores
    from affectlens.tasks.sounds import open_sound
    from affectlens.tasks.task import KINDS, Task, load_task
    from affectlens.tasks.written_answers import read_answer

__all__ = [
    "KINDS",
    "METRICS",
    "Example",
    "Scores",
    "Task",
    "load_task",
    "open_film",
    "open_picture",
    "open_sound",
    "read_answer",
]
__getattr__ = resolver(
    __name__,
    {
        "KINDS": "task",
        "METRICS": "scores",
        "Example": "examples",
        "Scores": "scores",
        "Task": "task",
        "load_task": "task",
        "open_film": "films",
        "open_picture": "pictures",
        "open_sound": "sounds",
        "read_answer": "written_answers",
    },
)
