"""affectlens: where did tuning for affect change a multimodal model, and does it carry the behaviour?

    where (sites) → what is on disk (checkpoints) → how far it moved (drift) → the live model (lens)
      → what if (interventions) → judged by what (tasks) → what changed (effects) → shown (views)

Public names are resolved when first used, so that `import affectlens` loads neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from affectlens.checkpoints import Checkpoint, open_checkpoint
    from affectlens.demo import Demo, load_demo
    from affectlens.drift import Drift, diff
    from affectlens.effects import Effects, Grid, evaluate, sweep
    from affectlens.errors import AffectlensError
    from affectlens.interventions import Transplant, Zero
    from affectlens.lens import Lens, load
    from affectlens.sites import Site, Sites
    from affectlens.studying import Study, study
    from affectlens.tasks import Example, Scores, Task, load_task
    from affectlens.views import Plot, Report, plot

__version__ = "0.1.0"

_HOME = {
    "checkpoints": ("Checkpoint", "open_checkpoint"),
    "demo": ("Demo", "load_demo"),
    "drift": ("Drift", "diff"),
    "effects": ("Effects", "Grid", "evaluate", "sweep"),
    "errors": ("AffectlensError",),
    "interventions": ("Transplant", "Zero"),
    "lens": ("Lens", "load"),
    "sites": ("Site", "Sites"),
    "studying": ("Study", "study"),
    "tasks": ("Example", "Scores", "Task", "load_task"),
    "views": ("Plot", "Report", "plot"),
}
_WHERE = {name: folder for folder, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of the argument
    "Site", "Sites",
    "Checkpoint", "open_checkpoint",
    "Drift", "diff",
    "Lens", "load",
    "Transplant", "Zero",
    "Example", "Scores", "Task", "load_task",
    "Effects", "Grid", "evaluate", "sweep",
    "Plot", "Report", "plot",
    "Study", "study",
    "Demo", "load_demo",
    "AffectlensError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'affectlens' has no attribute {name!r}")
    return getattr(import_module(f"affectlens.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
