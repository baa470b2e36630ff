"""The record beside the weights, `affectlens.json`: interventions, sources by hash, what was left behind.

It holds no command and no absolute path, since it goes wherever the folder goes.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Checkpoint, pair
from affectlens.checkpoints.documents import read_json
from affectlens.checkpoints.folders import RECORD
from affectlens.errors import NothingToCompare
from affectlens.interventions.on_weights import deletions, zeroed
from affectlens.sites import Point, Points, Site, Sites, sections
from affectlens.table import versions

FORMAT = "affectlens.edited/1"
# Activations that map zero to zero, by parts of their names in configs; no notice is given for any other.
_THROUGH_ZERO = ("silu", "swish", "gelu", "relu", "mish", "tanh")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "act_fn")


@dataclass(frozen=True)
class AppliedIntervention:
    """One intervention with the sites that it edited and its opened donor."""

    intervention: object
    sites: Sites
    donor: Checkpoint | None

    def described(self) -> dict[str, Any]:
        """Return the intervention in JSON types: its class, parameters, donor's identity and sites."""
        found: dict[str, Any] = {"intervention": type(self.intervention).__name__}
        if dataclasses.is_dataclass(self.intervention):
            for field in dataclasses.fields(self.intervention):
                value = getattr(self.intervention, field.name)
                # The donor and the sites follow below; another object is named by its class.
                if not isinstance(value, Checkpoint | Site | Sites | Point | Points):
                    known = value is None or isinstance(value, str | int | float | bool)
                    found[field.name] = value if known else type(value).__name__
        if self.donor is not None:
            found["donor"] = self.donor.identity
        return {**found, "sites": [repr(site) for site in self.sites]}


def record(live: Checkpoint, steps: tuple[AppliedIntervention, ...]) -> dict[str, Any]:
    """Return the record of interventions on a checkpoint, in JSON types."""
    donors = {id(step.donor): step.donor for step in steps if step.donor is not None}
    sites = Sites(site for step in steps for site in step.sites)
    said = [words for s in steps for words in notices(live, s.intervention, sites=s.sites, donor=s.donor)]
    return {
        "format": FORMAT,
        "base": live.identity,
        "interventions": [step.described() for step in steps],
        "edited": {**_counted(live, sites), "roles": _by_role(live, sites)},
        "not_carried_over": {
            donor.store.name: list(not_carried_over(live, donor)) for donor in donors.values()
        },
        "notices": list(dict.fromkeys(said)),
        "versions": dict(versions()),
    }


def write_record(found: Mapping[str, Any], folder: Path) -> None:
    """Write a record into a folder."""
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    # A file's name may hold half of a surrogate pair, which UTF-8 can't encode.
    (folder / RECORD).write_text(text, "utf-8", errors="replace")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the record of a written folder; raise `CheckpointError` if there is none, or no JSON."""
    return read_json(Path(folder) / RECORD).content


def notices(
    live: Checkpoint, intervention: object, *, sites: Sites, donor: Checkpoint | None
) -> Iterator[str]:
    """Yield sentences on what a reader could overlook in one intervention."""
    towers = Counter(site.tower for site in sites)
    if len(towers) > 1:
        counts = ", ".join(f"{tower} {count}" for tower, count in towers.most_common())
        yield f"The selection spans towers ({counts} sites)."
    if donor is not None and not any(donor.targeted(site) for site in sites):
        yield f"{donor.store.name} does not touch these sites, so nothing changes."
    yield from deletions(live, zeroed(intervention), starts_at_zero=lambda site: _through_zero(live, site))


def not_carried_over(base: Checkpoint, donor: Checkpoint) -> tuple[str, ...]:
    """Return sentences on how two checkpoints differ beside weights; none if they share no parameter."""
    try:
        return pair(base, donor).unlike
    except NothingToCompare:
        return ()


def _counted(live: Checkpoint, sites: Sites) -> dict[str, int]:
    # A head beside its whole matrix would count twice.
    whole = [site for site in sites if site == site.at() or site.at() not in sites]
    places = [live.at(site) for site in whole]
    tensors = {where.tensor for where in places}
    return {"sites": len(sites), "tensors": len(tensors), "parameters": sum(where.size for where in places)}


def _by_role(live: Checkpoint, sites: Sites) -> dict[str, dict[str, int]]:
    groups = sites.by("tower", "role")
    return {f"{tower} {role}": _counted(live, group) for (tower, role), group in groups.items()}


def _through_zero(live: Checkpoint, site: Site) -> bool:
    """Return whether the config names an activation that maps zero to zero."""
    settings = sections(live.config, [site.tower])[site.tower]
    stated = next((settings[key] for key in _ACTIVATIONS if key in settings), "")
    return isinstance(stated, str) and any(name in stated for name in _THROUGH_ZERO)
