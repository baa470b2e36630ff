"""The verbs of the command line. Heavy imports stay inside them, so that `--help` answers at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affectlens.cli.modifying import export, scale, transplant, zero
from affectlens.cli.options import (
    Alpha,
    Base,
    Control,
    ControlTasks,
    Cue,
    Draws,
    Dtype,
    Folder,
    Output,
    Preset,
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

app = typer.Typer(
    name="affectlens",
    help="Find where tuning for affect changed a multimodal model, and test what that does to its behaviour.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(out: Folder = Path("demo")) -> None:
    """Run a study of the small pair of models that comes with affectlens."""
    import torch

    from affectlens.demo import load_demo
    from affectlens.studying import study

    # On a model this small, threads cost more time than they save, most of all on a busy machine.
    torch.set_num_threads(1)
    base, tuned, control, tasks = load_demo()
    title = "Affect tuning of the embedded pair"
    found = study(base, tuned, tasks=tasks, control=control, out=out, dtype="float32", title=title)
    _print_study(found, out)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Folder, file or hub id of a checkpoint or adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per tensor.")] = False,
    verify: Annotated[bool, typer.Option(help="Run the model to test what each matrix does.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what a checkpoint is and where its parameters are."""
    from affectlens.cli.inspecting import inspect as inspect_

    inspect_(source, as_json=as_json, verify=verify, trust_remote_code=trust_remote_code)


@app.command()
def diff(
    base: Base,
    tuned: Tuned,
    control: Control = None,
    preset: Preset = None,
    alpha: Alpha = None,
    by: Annotated[
        str, typer.Option(help="Group by role, layer or tower, or by several: tower,role.")
    ] = "tower,role",
    detail: Annotated[
        str | None, typer.Option(help="heads, neurons or exact, or several: heads,neurons.")
    ] = None,
    spectra: Annotated[
        int | None,
        typer.Option(min=1, help="Also compute this many singular values of each change, the largest."),
    ] = None,
    align: Annotated[bool, typer.Option("--align", help="Also match the neurons of gated MLPs.")] = False,
    output: Output = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the groups and the ledger as JSON.")] = False,
) -> None:
    """Measure how far every parameter moved from BASE to TUNED."""
    from affectlens.cli.inspecting import show_drift
    from affectlens.drift import diff as diff_
    from affectlens.drift.diffing import refuse_unrelated

    _refuse_unwritable(output)
    drift = diff_(
        base,
        tuned,
        control=control,
        preset=preset,
        alpha=alpha,
        detail=detail,
        spectra=spectra,
        align=align,
    )
    refuse_unrelated(drift)
    if output is not None:
        drift.save(output)
    show_drift(drift, by=by, as_json=as_json)
    if output is not None and not as_json:
        print(f"\nThe table is in {seen(str(output))}.")


for verb in (transplant, zero, scale, export):
    app.command()(verb)


@app.command()
def sweep(
    base: Base,
    tuned: Tuned,
    task: Tasks,
    control: Control = None,
    control_task: ControlTasks = None,
    by: Annotated[
        str, typer.Option(help="Group by site, role, layer or tower, or by several: role,layer.")
    ] = "role",
    actions: Annotated[
        str, typer.Option(help="Any of transplant, revert and zero, with commas between.")
    ] = "transplant,revert",
    prompt_of: PromptOf = "base",
    cue: Cue = "",
    n_random: Draws = 20,
    seed: Seed = 0,
    dtype: Dtype = "auto",
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
    _refuse_unwritable(output)
    before = open_checkpoint(base)
    chosen = tuple(action.strip() for action in actions.split(","))
    grid = Grid(before.sites, by, chosen, donor=tuned, control=control, n_random=n_random, seed=seed)
    kept = journal or (output and output.with_name(f"{output.name}.journal"))
    executor = processes(workers) if workers else None
    lens = load(before, dtype=dtype, cue=cue, trust_remote_code=trust_remote_code)
    effects = sweep_(lens, grid, tasks, prompt_of=prompt_of, executor=executor, journal=kept)
    if output is not None:
        effects.save(output)
    print("\n".join(tell_effects(effects)))
    if output is not None:
        print(f"\nThe table is in {seen(str(output))}.")
    _refuse_incomplete(effects)
    if kept is not None and journal is None:
        discard(kept)  # the table is complete and saved


@app.command()
def study(
    base: Base,
    tuned: Tuned,
    task: Tasks,
    control: Control = None,
    control_task: ControlTasks = None,
    out: Folder = Path("study"),
    prompt_of: PromptOf = "base",
    cue: Cue = "",
    n_random: Draws = 20,
    seed: Seed = 0,
    dtype: Dtype = "auto",
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
        prompt_of=prompt_of,
        cue=cue,
        n_random=n_random,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        executor=processes(workers) if workers else None,
    )
    _print_study(found, out)
    _refuse_incomplete(found.effects)


@app.command()
def report(
    drift: Annotated[Path, typer.Argument(help="A drift table, saved by `diff -o`.")],
    effects: Annotated[Path | None, typer.Argument(help="An effects table, saved by `sweep -o`.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write saved tables as one self-contained HTML file."""
    from affectlens.drift import Drift
    from affectlens.effects import Effects
    from affectlens.views import Report

    tables: list[Drift | Effects] = [Drift.load(drift)]
    if effects is not None:
        tables.append(Effects.load(effects))
    Report(*tables).save(output)
    print(f"The report is in {seen(str(output))}.")


def _refuse_incomplete(effects: "Effects") -> None:
    """Raise `ExecutionError` if interventions failed, so that a script sees exit code 1."""
    from affectlens.errors import ExecutionError

    if len(effects.failed):
        raise ExecutionError(effects.notices[0])


def _refuse_unwritable(output: Path | None) -> None:
    """Raise `TableError` before the work, which may take hours, if its table can't be saved."""
    from affectlens.table import writable

    if output is not None:
        writable(output)


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


def _print_study(found: "Study", out: Path) -> None:
    parts = (
        tell_drift(found.drift),
        tell_effects(found.effects),
        tell_conclusions(found.drift, found.effects),
        [f"The report is in {seen(str(out / 'report.html'))}, and the tables are beside it."],
    )
    print("\n\n".join("\n".join(lines) for lines in parts))
