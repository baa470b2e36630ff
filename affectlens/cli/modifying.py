"""The verbs that write edited checkpoints: transplant, zero, scale, export."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from affectlens.cli.text import warned
from affectlens.printable import aligned, plain, seen

if TYPE_CHECKING:
    from affectlens.checkpoints import Checkpoint
    from affectlens.interventions import Scale, Transplant, Zero
    from affectlens.sites import Sites

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
_RANGE = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", re.ASCII)
_SETTINGS = ("alpha", "factor", "seed")


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
    from affectlens.writing import export as export_
    from affectlens.writing import merge

    if merged:
        merge(source, base, out=out, preset=preset, alpha=alpha, link=link)
    else:
        export_(source, base, out=out, preset=preset, alpha=alpha)
    recount(out, as_json=as_json)


def _write(
    base: "Checkpoint", intervention: "Transplant | Zero | Scale", out: Path, *, link: bool, as_json: bool
) -> None:
    from affectlens.writing import write

    write(base, intervention, out, link=link)
    recount(out, as_json=as_json)


def some(sites: "Sites", roles: list[str] | None, towers: list[str] | None, layers: str | None) -> "Sites":
    """The same; raises a usage error where nothing is asked, and so all of the model would be meant."""
    if roles is None and towers is None and layers is None:
        raise typer.BadParameter("say which sites: --role, --tower or --layers")
    return chosen(sites, roles, towers, layers)


def chosen(sites: "Sites", roles: list[str] | None, towers: list[str] | None, layers: str | None) -> "Sites":
    """The sites of these roles, towers and layers; all where nothing is asked.

    Raises `NoSuchSite` for what is not there, and a usage error for what is no list of layers.
    """
    from affectlens.errors import NoSuchSite
    from affectlens.sites import layers as spans

    found = sites.where(role=_listed(roles), tower=_listed(towers))
    if layers is None:
        return found
    wanted = numbers(layers)
    lost = sorted(wanted - {site.layer for site in found})
    if lost:
        raise NoSuchSite(f"no site has layer={lost[0]}. Layers here: {spans(found)}")
    return found.where(layer=wanted)


def numbers(layers: str) -> set[int]:
    """Read numbers and ranges whose ends count; raises a usage error.

    >>> sorted(numbers("2-4,7"))
    [2, 3, 4, 7]
    """
    found: set[int] = set()
    for part in layers.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise typer.BadParameter(
                f"{layers!r} is no list of layers, such as 10-19,23", param_hint="--layers"
            )
        found |= set(range(first, last + 1))
    return found


def _listed(words: list[str] | None) -> list[str] | str | None:
    """Options that are repeated, or hold several between commas; one alone is told by itself in an error."""
    found = [word.strip() for one in words or () for word in one.split(",")]
    return found[0] if len(found) == 1 else found or None


def recount(out: Path, *, as_json: bool) -> None:
    """Print the record that lies in a folder that was written."""
    from affectlens.writing import read_record

    found = read_record(out)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    lines = _exported(found) if "adapter" in found else _edited(found)
    print("\n".join([*lines, f"It is in {seen(str(out))}."]))


def _edited(found: dict[str, Any]) -> list[str]:
    base, edited = found["base"], found["edited"]
    rows = [
        [role, *(f"{count[name]:,}" for name in ("sites", "parameters"))]
        for role, count in edited["roles"].items()
    ]
    share = edited["parameters"] / (base["parameters"] or 1)
    total = f"{edited['parameters']:,} of {base['parameters']:,} parameters ({share:.1%})"
    return [
        *(_step(step, base["name"]) for step in found["interventions"]),
        *aligned(("role", "sites", "parameters"), rows).splitlines(),
        f"{total}, in {edited['tensors']:,} tensors",
        *warned(found["notices"]),
        *_left(found["not_carried_over"]),
    ]


def _step(step: dict[str, Any], base: str) -> str:
    stated = ", ".join(
        f"{name} {step[name]:g}" for name in _SETTINGS if isinstance(step.get(name), int | float)
    )
    donor = f" from {plain(step['donor']['name'])}" if "donor" in step else ""
    return f"{step['intervention']} of {len(step['sites'])} sites{donor} in {plain(base)}" + (
        f": {stated}" if stated else ""
    )


def _left(donors: dict[str, list[str]]) -> list[str]:
    return [
        line
        for donor, sentences in donors.items()
        if sentences
        for line in (f"What no weights carry over from {plain(donor)}:", *warned(sentences))
    ]


def _exported(found: dict[str, Any]) -> list[str]:
    adapter = found["adapter"]
    whole = f", {adapter['saved_whole']} modules saved whole" if adapter["saved_whole"] else ""
    names = f"{plain(found['source']['name'])} over {plain(found['base']['name'])}"
    return [
        f"PEFT adapter of {names}: {adapter['modules']} modules, {adapter['parameters']:,} parameters{whole}",
        *warned(f"left out: {name} ({why})" for name, why in found["left_out"].items()),
    ]
