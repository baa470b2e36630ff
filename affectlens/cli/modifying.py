"""The verbs that write edited checkpoints, and the choice of the sites that they edit."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affectlens.cli.options import (
    Alpha,
    AsJson,
    Donor,
    Edited,
    Layers,
    Link,
    LoraAlpha,
    Out,
    Preset,
    Roles,
    Towers,
)
from affectlens.cli.text import tell_record
from affectlens.printable import seen

if TYPE_CHECKING:
    from affectlens.checkpoints import Checkpoint
    from affectlens.interventions import Scale, Transplant, Zero
    from affectlens.sites import Sites

_RANGE = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", re.ASCII)


def transplant(
    base: Edited,
    tuned: Donor,
    out: Out,
    role: Roles = None,
    tower: Towers = None,
    layers: Layers = None,
    alpha: Annotated[float, typer.Option(help="Share of the change: 1 for all, 0.5 for half.")] = 1.0,
    preset: Preset = None,
    lora_alpha: LoraAlpha = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write BASE with TUNED's weights at the selected sites (all by default)."""
    from affectlens.checkpoints import open_checkpoint, pair
    from affectlens.interventions import Transplant
    from affectlens.sites import Sites

    before = open_checkpoint(base)
    # Pairing gives a file of trained tensors the names and shapes of base.
    donor = pair(before, open_checkpoint(tuned, base=before, preset=preset, alpha=lora_alpha)).tuned
    sites = select(before.sites, role, tower, layers)
    if donor.change is not None:  # an adapter leaves the other sites as they are
        reached = Sites(site for site in sites if donor.targeted(site))
        sites = reached if len(reached) else sites
    _write(before, Transplant(sites, donor=donor, alpha=alpha), out, link=link, as_json=as_json)


def zero(
    base: Edited,
    out: Out,
    role: Roles = None,
    tower: Towers = None,
    layers: Layers = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write BASE with zeros at the selected sites."""
    from affectlens.checkpoints import open_checkpoint
    from affectlens.interventions import Zero

    before = open_checkpoint(base)
    _write(before, Zero(select_some(before.sites, role, tower, layers)), out, link=link, as_json=as_json)


def scale(
    base: Edited,
    factor: Annotated[float, typer.Option(help="Multiply the weights by this.")],
    out: Out,
    role: Roles = None,
    tower: Towers = None,
    layers: Layers = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write BASE with the weights at the selected sites multiplied by a factor."""
    from affectlens.checkpoints import open_checkpoint
    from affectlens.interventions import Scale

    before = open_checkpoint(base)
    edit = Scale(select_some(before.sites, role, tower, layers), factor=factor)
    _write(before, edit, out, link=link, as_json=as_json)


def export(
    source: Annotated[str, typer.Argument(help="An adapter, or a .pth that holds trained tensors only.")],
    base: Annotated[str, typer.Option(help="The checkpoint it was trained on.")],
    out: Out,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model, merged.")] = False,
    preset: Preset = None,
    alpha: Alpha = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter or a file of trained tensors as a PEFT adapter, or merged into its base."""
    from affectlens.writing import export as export_
    from affectlens.writing import merge

    if merged:
        merge(source, base, out=out, preset=preset, alpha=alpha, link=link)
    else:
        export_(source, base, out=out, preset=preset, alpha=alpha)
    show_record(out, as_json=as_json)


def _write(
    base: "Checkpoint", intervention: "Transplant | Zero | Scale", out: Path, *, link: bool, as_json: bool
) -> None:
    from affectlens.writing import write

    write(base, intervention, out, link=link)
    show_record(out, as_json=as_json)


def show_record(out: Path, *, as_json: bool) -> None:
    """Print the record in a folder that was written."""
    from affectlens.writing import read_record

    found = read_record(out)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print("\n".join([*tell_record(found), f"Written to {seen(str(out))}."]))


def select_some(
    sites: "Sites", roles: list[str] | None, towers: list[str] | None, layers: str | None
) -> "Sites":
    """Select as `select` does; raises a usage error without any option, which would mean the whole model."""
    if roles is None and towers is None and layers is None:
        raise typer.BadParameter("select sites with --role, --tower or --layers")
    return select(sites, roles, towers, layers)


def select(sites: "Sites", roles: list[str] | None, towers: list[str] | None, layers: str | None) -> "Sites":
    """Return the sites of these roles, towers and layers; each option that is missing means all.

    Raises `NoSuchSite` if there are none, and a usage error for a malformed list of layers.
    """
    from affectlens.errors import NoSuchSite
    from affectlens.sites import layers as spans

    found = sites.where(role=_listed(roles), tower=_listed(towers))
    if layers is None:
        return found
    wanted = numbers(layers)
    missing = sorted(wanted - {site.layer for site in found})
    if missing:
        raise NoSuchSite(f"no site has layer={missing[0]}. Layers here: {spans(found)}")
    return found.where(layer=wanted)


def numbers(layers: str) -> set[int]:
    """Read numbers and ranges, which include both ends. Raises a usage error.

    >>> sorted(numbers("2-4,7"))
    [2, 3, 4, 7]
    """
    found: set[int] = set()
    for part in layers.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise typer.BadParameter(
                f"{layers!r} is not a list of layers such as 10-19,23", param_hint="--layers"
            )
        found |= set(range(first, last + 1))
    return found


def _listed(words: list[str] | None) -> list[str] | str | None:
    """Return the words of an option that is repeated or has commas; a single word stays a word in errors."""
    found = [word.strip() for one in words or () for word in one.split(",")]
    return found[0] if len(found) == 1 else found or None
