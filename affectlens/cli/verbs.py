"""The verbs of the command line. Heavy imports stay inside them, so that `--help` answers at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from affectlens import __version__
from affectlens.cli.experiments import evaluate, print_study, refuse_unwritable, study, sweep
from affectlens.cli.modifying import export, scale, transplant, zero
from affectlens.cli.options import Alpha, Base, Control, Folder, Output, Preset, Trust, Tuned
from affectlens.printable import seen


def _print_version(asked: bool) -> None:
    if asked:
        print(f"affectlens {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="affectlens",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Find where tuning for affect changed a multimodal model, and test what that does to its behaviour."""


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
    print_study(found, out)


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

    refuse_unwritable(output)
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


_ELSEWHERE: tuple[Callable[..., None], ...] = (transplant, zero, scale, export, evaluate, sweep, study)
for verb in _ELSEWHERE:
    app.command()(verb)


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
