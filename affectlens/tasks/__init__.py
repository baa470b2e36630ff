"""JUDGED BY: examples, answers, metrics and their intervals; no model is known here.

JSON lines ── loading ──▶ Task (examples, labels, prompt) … answers of a model ──▶ Scores ── intervals
"""

from affectlens.tasks.examples import Example
from affectlens.tasks.scores import METRICS, Scores
from affectlens.tasks.task import KINDS, Task, load_task

__all__ = ["KINDS", "METRICS", "Example", "Scores", "Task", "load_task"]
