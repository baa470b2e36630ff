"""Whose chat template asks: that of base, so that all models are asked the same, or that of tuned."""

import copy
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, near
from affectlens.lens import Lens
from affectlens.lens.inputs.prompt_format import PromptFormat
from affectlens.lens.inputs.rendering import DATE
from affectlens.lens.loading import load_template
from affectlens.tasks import Task

WHOSE = ("base", "tuned")
PromptOf = str | Path | Checkpoint | Lens


def asked_as(lens: Lens, prompt_of: PromptOf, *, tuned: Checkpoint | None = None) -> Lens:
    """Return the lens with the prompts of `"base"` (its own), of `"tuned"`, or of another model.

    The template is the other model's; tokens and media are prepared for the model in `lens`, which is the one
    that runs. Raises `LensError` where there is no such template.
    """
    if isinstance(prompt_of, str) and prompt_of == "base":
        return lens
    found = copy.copy(lens)
    if isinstance(prompt_of, Lens):
        found.template = prompt_of.prompt_format.used
        return found
    if tuned is None and prompt_of == "tuned":
        raise LensError(
            "prompt_of='tuned' needs a tuned model, but this is a single lens. Give its path or its lens"
        )
    source = tuned if tuned is not None and prompt_of == "tuned" else prompt_of
    if isinstance(source, str) and "/" not in source and not Path(source).exists():
        raise LensError(
            f"unknown prompt_of={source!r}. Give {near(source, WHOSE)}, a path, a hub id or a lens"
        )
    found.template = load_template(source)
    if found.template is None:
        name = source.store.name if isinstance(source, Checkpoint) else str(source)
        raise LensError(f"{name} has no chat template of its own; use prompt_of='base'")
    # Beside an adapter a processor's template lies with the tokenizer alone; it is called as base's own is.
    own = lens.prompt_format.used
    return lens if own is not None and own.text == found.template.text else found


def describe_prompts(form: PromptFormat, task: Task) -> Mapping[str, Any]:
    """Return what a result states about its prompts: the template by its hash, and the first prompt."""
    used = form.used
    return {
        "template": sha256(str(used.text).encode()).hexdigest()[:12] if used is not None else None,
        "options": {name: str(value) for name, value in form.settings.items()},
        "cue": form.cue,
        "date": DATE.isoformat(),
        "first": form.prompt(task.examples[0], task.prompt),
    }
