"""What was done, written beside the weights: interventions, sources by their hashes, what was left behind.

No command and no absolute path: whoever is given the folder is given this too.
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
# Activations that map zero to zero, by how configs call them; of any other nothing is said.
_THROUGH_ZERO = ("silu", "swish", "gelu", "relu", "mish", "tanh")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "act_fn")


@dataclass(frozen=True)
class AppliedIntervention:
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


def record(live: Checkpoint, steps: tuple[AppliedIntervention, ...]) -> dict[str, Any]:
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


def notices(
    live: Checkpoint, intervention: object, *, sites: Sites, donor: Checkpoint | None
) -> Iterator[str]:
    """What must not be overlooked of one intervention, in sentences."""
    towers = Counter(site.tower for site in sites)
    if len(towers) > 1:
        counts = ", ".join(f"{tower} {count}" for tower, count in towers.most_common())
        yield f"The selection spans towers ({counts} sites)."
    if donor is not None and not any(donor.targeted(site) for site in sites):
        yield f"{donor.store.name} does not touch these sites, so nothing changes."
    yield from deletions(live, zeroed(intervention), starts_at_zero=lambda site: _through_zero(live, site))


def not_carried_over(base: Checkpoint, donor: Checkpoint) -> tuple[str, ...]:
    """What tells two whole checkpoints apart beside weights; nothing where they share too little to say."""
    try:
        return pair(base, donor).unlike
    except NothingToCompare:
        return ()


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


def _through_zero(live: Checkpoint, site: Site) -> bool:
    """Whether the config names an activation that maps zero to zero."""
    settings = sections(live.config, [site.tower])[site.tower]
    stated = next((settings[key] for key in _ACTIVATIONS if key in settings), "")
    return isinstance(stated, str) and any(name in stated for name in _THROUGH_ZERO)
