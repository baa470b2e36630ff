"""What was written, in a few lines: how much of the model was edited, and what did not come along."""

import json
from pathlib import Path
from typing import Any

from affectlens.cli.printing import aligned, warned
from affectlens.html import plain, seen

_SETTINGS = ("alpha", "factor", "seed")


def recount(out: Path, *, as_json: bool) -> None:
    """Print the record that lies in a folder that was written."""
    from affectlens.interventions.writing import read_record

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
