"""The verbs that write edited checkpoints: transplant, zero, scale, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affectlens.cli.choosing import chosen, some

if TYPE_CHECKING:
    from affectlens.checkpoints import Checkpoint
    from affectlens.interventions import Scale, Transplant, Zero

Base = Annotated[str, typer.Argument(help="Folder, file or hub id of the checkpoint to edit.")]
Donor = Annotated[str, typer.Argument(help="The checkpoint or adapter whose weights are put in.")]
Roles = Annotated[
    list[str] | None, typer.Option("--role", help="e.g. gate_proj; mlp or attention; may be repeated.")
]
Towers = Annotated[list[str] | None, typer.Option("--tower", help="language, vision, audio, …")]
Layers = Annotated[str | None, typer.Option(help="Numbers and ranges, ends included: 10-19,23.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The new folder.")]
Link = Annotated[
    bool,
    typer.Option(
        "--link", help="Give unchanged files a second name instead of a copy: never write into them."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]
Preset = Annotated[str | None, typer.Option(help="Known source of bare trainables, e.g. affectgpt.")]


def transplant(
    base: Base,
    tuned: Donor,
    out: Out,
    role: Roles = None,
    tower: Towers = None,
    layers: Layers = None,
    alpha: Annotated[float, typer.Option(help="How much of the change: 1 all, 0.5 half of it.")] = 1.0,
    preset: Preset = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA's alpha, where no file says it.")] = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write BASE with TUNED's weights at some sites."""
    from affectlens.checkpoints import open_checkpoint, pair
    from affectlens.interventions import Transplant
    from affectlens.sites import Sites

    before = open_checkpoint(base)
    # A file of what was trained is known for what it is beside base.
    donor = pair(before, open_checkpoint(tuned, base=before, preset=preset, alpha=lora_alpha)).tuned
    sites = chosen(before.sites, role, tower, layers)
    if donor.change is not None:  # an adapter leaves the others as they are
        reached = Sites(site for site in sites if donor.targeted(site))
        sites = reached if len(reached) else sites
    _write(before, Transplant(sites, donor=donor, alpha=alpha), out, link=link, as_json=as_json)


def zero(
    base: Base,
    out: Out,
    role: Roles = None,
    tower: Towers = None,
    layers: Layers = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write BASE with zeros at some sites."""
    from affectlens.checkpoints import open_checkpoint
    from affectlens.interventions import Zero

    before = open_checkpoint(base)
    _write(before, Zero(some(before.sites, role, tower, layers)), out, link=link, as_json=as_json)


def scale(
    base: Base,
    factor: Annotated[float, typer.Option(help="What the weights are multiplied by.")],
    out: Out,
    role: Roles = None,
    tower: Towers = None,
    layers: Layers = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write BASE with the weights of some sites multiplied."""
    from affectlens.checkpoints import open_checkpoint
    from affectlens.interventions import Scale

    before = open_checkpoint(base)
    found = Scale(some(before.sites, role, tower, layers), factor=factor)
    _write(before, found, out, link=link, as_json=as_json)


def export(
    source: Annotated[str, typer.Argument(help="An adapter, or a .pth of trainables.")],
    base: Annotated[str, typer.Option(help="What it was trained on.")],
    out: Out,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model, merged.")] = False,
    preset: Preset = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha, where no file says it.")] = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter or a file of trainables as a PEFT adapter, or merged into its base."""
    from affectlens.cli.recounting import recount
    from affectlens.interventions.writing import export as export_
    from affectlens.interventions.writing import merge

    if merged:
        merge(source, base, out=out, preset=preset, alpha=alpha, link=link)
    else:
        export_(source, base, out=out, preset=preset, alpha=alpha)
    recount(out, as_json=as_json)


def _write(
    base: "Checkpoint", intervention: "Transplant | Zero | Scale", out: Path, *, link: bool, as_json: bool
) -> None:
    from affectlens.cli.recounting import recount
    from affectlens.interventions.writing import write

    write(base, intervention, out, link=link)
    recount(out, as_json=as_json)
