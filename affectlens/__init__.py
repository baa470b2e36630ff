"""affectlens: where did tuning for affect change a multimodal model, and does it carry the behaviour?

    where (sites) → what is on disk (checkpoints) → how far it moved (drift) → the live model (lens)
      → what if (interventions) → judged by what (tasks) → what changed (effects) → shown (views)

Python resolves the public names when they are first used, so `import affectlens` loads neither torch nor
pandas.
"""

from typing import TYPE_CHECKING

from affectlens.lazy import resolver

if TYPE_CHECKING:
    from affectlens.checkpoints import Checkpoint, open_checkpoint
    from affectlens.demo import Demo, load_demo
    from affectlens.drift import Agreement, Drift, Trajectory, agreement, diff, trajectory
    from affectlens.effects import Effects, Grid, evaluate, sweep
    from affectlens.errors import AffectlensError
    from affectlens.interventions import (
        Knockout,
        Mean,
        Patch,
        Randomise,
        Resample,
        Scale,
        Shuffle,
        Steer,
        Transplant,
        Zero,
    )
    from affectlens.lens import Lens, load
    from affectlens.sites import Point, Points, Site, Sites
    from affectlens.studying import Study, study
    from affectlens.tasks import Example, Scores, Task, load_task
    from affectlens.views import Plot, Report, plot
    from affectlens.writing import write

__version__ = "0.1.0"

_HOME = {
    "AffectlensError": "errors",
    "Agreement": "drift",
    "Checkpoint": "checkpoints",
    "Demo": "demo",
    "Drift": "drift",
    "Effects": "effects",
    "Example": "tasks",
    "Grid": "effects",
    "Knockout": "interventions",
    "Lens": "lens",
    "Mean": "interventions",
    "Patch": "interventions",
    "Plot": "views",
    "Point": "sites",
    "Points": "sites",
    "Randomise": "interventions",
    "Report": "views",
    "Resample": "interventions",
    "Scale": "interventions",
    "Scores": "tasks",
    "Shuffle": "interventions",
    "Site": "sites",
    "Sites": "sites",
    "Steer": "interventions",
    "Study": "studying",
    "Task": "tasks",
    "Trajectory": "drift",
    "Transplant": "interventions",
    "Zero": "interventions",
    "agreement": "drift",
    "diff": "drift",
    "evaluate": "effects",
    "load": "lens",
    "load_demo": "demo",
    "load_task": "tasks",
    "open_checkpoint": "checkpoints",
    "plot": "views",
    "study": "studying",
    "sweep": "effects",
    "trajectory": "drift",
    "write": "writing",
}

__all__ = [  # noqa: RUF022 - in the order of the argument
    "Site", "Sites", "Point", "Points",
    "Checkpoint", "open_checkpoint",
    "Drift", "diff", "Trajectory", "trajectory", "Agreement", "agreement",
    "Lens", "load",
    "Transplant", "Zero", "Scale", "Randomise", "Shuffle",
    "Mean", "Resample", "Patch", "Steer", "Knockout",
    "write",
    "Example", "Scores", "Task", "load_task",
    "Effects", "Grid", "evaluate", "sweep",
    "Plot", "Report", "plot",
    "Study", "study",
    "Demo", "load_demo",
    "AffectlensError",
]  # fmt: skip


__getattr__ = resolver(__name__, _HOME)


def __dir__() -> list[str]:
    # Without what this file needs itself, and the modules that happen to be imported by now.
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
