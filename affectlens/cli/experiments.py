"""The verbs that run models: evaluate, sweep and study. Heavy imports stay inside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affectlens.cli.options import (
    Actions,
    Base,
    BatchSize,
    By,
    Control,
    ControlTasks,
    Cue,
    Device,
    Draws,
    Dtype,
    Folder,
    Output,
    PromptOf,
    Seed,
    Tasks,
    Trust,
    Tuned,
    Workers,
)
from affectlens.cli.text import tell_conclusions, tell_drift, tell_effects
from affectlens.printable import seen

if TYPE_CHECKING:
    from affectlens.effects import Effects
    from affectlens.studying import Study
    from affectlens.tasks import Task


def evaluate(
    source: Annotated[str, typer.Argument(help="The checkpoint to ask: a folder, file or hub id.")],
    task: Tasks,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Let the model write its answer instead of scoring the labels.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a written answer.")] = 8,
    prompt_of: PromptOf = "base",
    cue: Cue = "",
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 32,
    output: Output = None,
    trust_remote_code: Trust = False,
) -> None:
    """Let a model answer tasks, and print its scores with their intervals."""
    from affectlens.effects import evaluate as evaluate_
    from affectlens.errors import TaskError
    from affectlens.lens import load

    tasks = _tasks(task)
    refuse_unwritable(output)
    if output is not None and len(tasks) > 1:
        raise TaskError(f"--output holds the answers to one task, but {len(tasks)} were given")
    lens = load(source, device=device, dtype=dtype, cue=cue, trust_remote_code=trust_remote_code)
    for one in tasks:
        scores = evaluate_(
            lens,
            one,
            answer="greedy" if greedy else "constrained",
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            prompt_of=prompt_of,
        )
        print(seen(scores.summary))
        if output is not None:
            scores.save(output)
            print(f"\nThe table is in {seen(str(output))}.")


def sweep(
    base: Base,
    tuned: Tuned,
    task: Tasks,
    control: Control = None,
    control_task: ControlTasks = None,
    by: By = "role",
    actions: Actions = "transplant,revert",
    prompt_of: PromptOf = "base",
    cue: Cue = "",
    n_random: Draws = 20,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 64,
    output: Output = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="Keep each result in this file and resume from it; by default beside --output."),
    ] = None,
    workers: Workers = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Transplant, revert or zero groups of sites, and judge each edited model by tasks."""
    from affectlens.checkpoints import open_checkpoint
    from affectlens.effects import Grid
    from affectlens.effects import sweep as sweep_
    from affectlens.effects.journal import discard
    from affectlens.executing import processes
    from affectlens.lens import load

    tasks = [*_tasks(task), *_tasks(control_task or [], "control")]
    refuse_unwritable(output)
    before = open_checkpoint(base)
    grid = Grid(
        before.sites, by, _listed(actions), donor=tuned, control=control, n_random=n_random, seed=seed
    )
    kept = journal or (output and output.with_name(f"{output.name}.journal"))
    executor = processes(workers) if workers else None
    lens = load(before, device=device, dtype=dtype, cue=cue, trust_remote_code=trust_remote_code)
    effects = sweep_(
        lens,
        grid,
        tasks,
        batch_size=batch_size,
        executor=executor,
        journal=kept,
        prompt_of=prompt_of,
    )
    if output is not None:
        effects.save(output)
    print("\n".join(tell_effects(effects)))
    if output is not None:
        print(f"\nThe table is in {seen(str(output))}.")
    _refuse_incomplete(effects)
    if kept is not None and journal is None:
        discard(kept)  # the table is complete and saved


def study(
    base: Base,
    tuned: Tuned,
    task: Tasks,
    control: Control = None,
    control_task: ControlTasks = None,
    out: Folder = Path("study"),
    by: Annotated[
        str | None,
        typer.Option(help="Group by these instead of roles, attention and MLP: site, layer, role,layer, …"),
    ] = None,
    actions: Actions = "transplant,revert,zero",
    prompt_of: PromptOf = "base",
    cue: Cue = "",
    n_random: Draws = 20,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Run drift, sweep and report in one go."""
    from affectlens.executing import processes
    from affectlens.studying import study as study_

    found = study_(
        base,
        tuned,
        tasks=[*_tasks(task), *_tasks(control_task or [], "control")],
        control=control,
        out=out,
        by=by,
        actions=_listed(actions),
        prompt_of=prompt_of,
        cue=cue,
        n_random=n_random,
        seed=seed,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        executor=processes(workers) if workers else None,
    )
    print_study(found, out)
    _refuse_incomplete(found.effects)


def print_study(found: "Study", out: Path) -> None:
    parts = (
        tell_drift(found.drift),
        tell_effects(found.effects),
        tell_conclusions(found.drift, found.effects),
        [f"The report is in {seen(str(out / 'report.html'))}, and the tables are beside it."],
    )
    print("\n\n".join("\n".join(lines) for lines in parts))


def refuse_unwritable(output: Path | None) -> None:
    """Raise `TableError` before the work, which may take hours, if its table can't be saved."""
    from affectlens.table import writable

    if output is not None:
        writable(output)


def _refuse_incomplete(effects: "Effects") -> None:
    """Raise `ExecutionError` if interventions failed, so that a script sees exit code 1."""
    from affectlens.errors import ExecutionError

    if len(effects.failed):
        raise ExecutionError(effects.notices[0])


def _listed(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


def _tasks(specs: list[str], role: str = "affective") -> "list[Task]":
    from affectlens.errors import TaskError
    from affectlens.tasks import load_task

    tasks = []
    for spec in specs:
        kind, equals, file = spec.partition("=")
        if not equals:
            raise TaskError(f"--task {spec}: no KIND given. Write e.g. --task emotion-labels={spec}")
        name, _, kind = kind.rpartition(":")
        tasks.append(load_task(kind, file, name=name, role=role))
    return tasks
