"""The verbs of the command line. Heavy imports stay inside, so that `--help` answers at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affectlens.cli.modifying import export, scale, transplant, zero
from affectlens.cli.text import tell_conclusions, tell_drift, tell_effects

if TYPE_CHECKING:
    from affectlens.effects import Effects
    from affectlens.studying import Study
    from affectlens.tasks import Task

app = typer.Typer(
    name="affectlens",
    help="The microscope for affect in multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Base = Annotated[str, typer.Argument(help="Folder, file or hub id of the checkpoint before tuning.")]
Tuned = Annotated[str, typer.Argument(help="The same after tuning.")]
Control = Annotated[str | None, typer.Option(help="A tuning of the same base on something else than affect.")]
Tasks = Annotated[
    list[str], typer.Option("--task", help="[NAME:]KIND=FILE.jsonl; kinds: emotion-labels, valence, labels.")
]
Others = Annotated[
    list[str] | None,
    typer.Option("--control-task", help="The same, for what the control was tuned on."),
]
Folder = Annotated[Path, typer.Option(help="Folder for the tables and the report.")]
Dtype = Annotated[str, typer.Option(help="dtype of the live model; auto is the stored one.")]
Journal = Annotated[
    Path | None,
    typer.Option(help="Keep each result here at once, and go on from it; by default beside --output."),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that judge at a time; 0: this one.")]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model: a stranger's program."),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write here; the suffix says how.")]


@app.command()
def demo(out: Folder = Path("demo")) -> None:
    """Run the whole argument on the pair that comes with affectlens."""
    import torch

    from affectlens.demo import load_demo
    from affectlens.studying import study

    # On a model this small a second thread waits more than it works, and several times so on a busy machine.
    torch.set_num_threads(1)
    base, tuned, control, tasks = load_demo()
    title = "Affect tuning of the embedded pair"
    found = study(base, tuned, tasks=tasks, control=control, out=out, dtype="float32", title=title)
    _tell(found, out)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Folder, file or hub id of a checkpoint or adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a tensor.")] = False,
    verify: Annotated[bool, typer.Option(help="Run the model and test what each matrix does.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Say what a checkpoint is, and where its parameters are."""
    from affectlens.cli.inspecting import inspect as inspect_

    inspect_(source, as_json=as_json, verify=verify, trust_remote_code=trust_remote_code)


@app.command()
def diff(
    base: Base,
    tuned: Tuned,
    control: Control = None,
    preset: Annotated[
        str | None, typer.Option(help="Known source of bare trainables, e.g. affectgpt.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha, where no file says it.")] = None,
    by: Annotated[
        str, typer.Option(help="role, layer or tower; comma-separated for several.")
    ] = "tower,role",
    detail: Annotated[
        str | None, typer.Option(help="heads, neurons, exact; comma-separated for several.")
    ] = None,
    spectra: Annotated[
        int | None, typer.Option(min=1, help="Also the top K singular values of each change.")
    ] = None,
    align: Annotated[bool, typer.Option("--align", help="Also match the neurons of gated MLPs.")] = False,
    output: Output = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print role table and ledger as JSON.")] = False,
) -> None:
    """Say how far every parameter moved from BASE to TUNED."""
    from affectlens.cli.inspecting import Asked, compare

    _early(output)
    asked = Asked(base, tuned, control, preset, alpha, detail, spectra, align)
    compare(asked, by=by, output=output, as_json=as_json)


for verb in (transplant, zero, scale, export):
    app.command()(verb)


@app.command()
def sweep(
    base: Base,
    tuned: Tuned,
    task: Tasks,
    control: Control = None,
    control_task: Others = None,
    by: Annotated[
        str, typer.Option(help="site, role, layer or tower; comma-separated for several.")
    ] = "role",
    actions: Annotated[
        str, typer.Option(help="Of transplant, revert, zero; comma-separated.")
    ] = "transplant,revert",
    n_random: Annotated[int, typer.Option(help="Draws of the layer-stratified null.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    dtype: Dtype = "auto",
    output: Output = None,
    journal: Journal = None,
    workers: Workers = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Transplant, revert and zero groups of sites, and judge each model by tasks."""
    from affectlens.checkpoints import open_checkpoint
    from affectlens.effects import Grid
    from affectlens.effects import sweep as sweep_
    from affectlens.effects.journal import discard
    from affectlens.executing import processes
    from affectlens.lens import load

    tasks = [*_tasks(task), *_tasks(control_task or [], "control")]
    _early(output)
    before = open_checkpoint(base)
    chosen = tuple(action.strip() for action in actions.split(","))
    grid = Grid(before.sites, by, chosen, donor=tuned, control=control, n_random=n_random, seed=seed)
    kept = journal or (output and output.with_name(f"{output.name}.journal"))
    executor = processes(workers) if workers else None
    lens = load(before, dtype=dtype, trust_remote_code=trust_remote_code)
    effects = sweep_(lens, grid, tasks, executor=executor, journal=kept)
    if output is not None:
        effects.save(output)
    print("\n".join(tell_effects(effects)))
    if output is not None:
        print(f"\nThe table is in {output}.")
    _whole(effects)
    if kept is not None and journal is None:
        discard(kept)  # the table has it all by now


@app.command()
def study(
    base: Base,
    tuned: Tuned,
    task: Tasks,
    control: Control = None,
    control_task: Others = None,
    out: Folder = Path("study"),
    n_random: Annotated[int, typer.Option(help="Draws of the layer-stratified null.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    dtype: Dtype = "auto",
    workers: Workers = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Run the whole argument: drift, sweep and report."""
    from affectlens.executing import processes
    from affectlens.studying import study as study_

    found = study_(
        base,
        tuned,
        tasks=[*_tasks(task), *_tasks(control_task or [], "control")],
        control=control,
        out=out,
        n_random=n_random,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        executor=processes(workers) if workers else None,
    )
    _tell(found, out)
    _whole(found.effects)


@app.command()
def report(
    drift: Annotated[Path, typer.Argument(help="A drift table, as `diff -o` writes it.")],
    effects: Annotated[Path | None, typer.Argument(help="An effects table, as `sweep -o` writes it.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The report.")] = Path("report.html"),
) -> None:
    """Make one self-contained HTML file of saved tables."""
    from affectlens.drift import Drift
    from affectlens.effects import Effects
    from affectlens.views import Report

    tables: list[Drift | Effects] = [Drift.load(drift)]
    if effects is not None:
        tables.append(Effects.load(effects))
    Report(*tables).save(output)
    print(f"The report is in {output}.")


def _whole(effects: "Effects") -> None:
    """Raise `ExecutionError` where a part of a sweep is missing: a script must hear of it."""
    from affectlens.errors import ExecutionError

    if len(effects.failed):
        raise ExecutionError(effects.notices[0])


def _early(output: Path | None) -> None:
    """Refuse what can't be written before any work is done for it."""
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
            raise TaskError(f"--task {spec}: write KIND=FILE.jsonl, e.g. emotion-labels={spec}")
        name, _, kind = kind.rpartition(":")
        tasks.append(load_task(kind, file, name=name, role=role))
    return tasks


def _tell(found: "Study", out: Path) -> None:
    parts = (
        tell_drift(found.drift),
        tell_effects(found.effects),
        tell_conclusions(found.drift, found.effects),
        [f"The report is in {out / 'report.html'}, the tables beside it."],
    )
    print("\n\n".join("\n".join(lines) for lines in parts))
