"""What was done, written beside the weights: interventions, sources by their hashes, what was left behind.

No command and no absolute path: whoever is given the folder is given this too.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.folders import RECORD
from affectlens.checkpoints.parsing import read_json
from affectlens.interventions.writing.noticing import not_carried_over, notices
from affectlens.sites import Point, Points, Site, Sites
from affectlens.table import versions

FORMAT = "affectlens.edited/1"


@dataclass(frozen=True)
class Step:
    """One intervention, as it was carried out."""

    intervention: object
    sites: Sites
    donor: Checkpoint | None

    def described(self) -> dict[str, Any]:
        """The intervention as JSON: its class, its parameters, its donor's identity, its sites."""
        found: dict[str, Any] = {"intervention": type(self.intervention).__name__}
        if dataclasses.is_dataclass(self.intervention):
            for field in dataclasses.fields(self.intervention):
                value = getattr(self.intervention, field.name)
                if not isinstance(value, Checkpoint | Site | Sites | Point | Points):
                    known = value is None or isinstance(value, str | int | float | bool)
                    found[field.name] = value if known else type(value).__name__
        if self.donor is not None:
            found["donor"] = self.donor.identity
        return {**found, "sites": [repr(site) for site in self.sites]}


def record(live: Checkpoint, steps: tuple[Step, ...]) -> dict[str, Any]:
    """Say what steps made of a checkpoint; JSON-like."""
    donors = {id(step.donor): step.donor for step in steps if step.donor is not None}
    sites = Sites(site for step in steps for site in step.sites)
    told = [words for s in steps for words in notices(live, s.intervention, sites=s.sites, donor=s.donor)]
    return {
        "format": FORMAT,
        "base": live.identity,
        "interventions": [step.described() for step in steps],
        "edited": {**_counted(live, sites), "roles": _by_role(live, sites)},
        "not_carried_over": {
            donor.store.name: list(not_carried_over(live, donor)) for donor in donors.values()
        },
        "notices": list(dict.fromkeys(told)),
        "versions": dict(versions()),
    }


def write_record(found: Mapping[str, Any], folder: Path) -> None:
    """Write it into the folder."""
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(text, "utf-8", errors="replace")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read what `write` put there; raises `CheckpointError` where nothing is, or no JSON."""
    return read_json(Path(folder) / RECORD).content


def _counted(live: Checkpoint, sites: Sites) -> dict[str, int]:
    whole = [
        site for site in sites if site == site.at() or site.at() not in sites
    ]  # a head of it counts once
    places = [live.at(site) for site in whole]
    tensors = {where.tensor for where in places}
    return {"sites": len(sites), "tensors": len(tensors), "parameters": sum(where.size for where in places)}


def _by_role(live: Checkpoint, sites: Sites) -> dict[str, dict[str, int]]:
    groups = sites.by("tower", "role")
    return {f"{tower} {role}": _counted(live, group) for (tower, role), group in groups.items()}
