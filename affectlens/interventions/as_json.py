"""Write interventions as JSON and read them again, so that another process can carry out the same plan.

    Transplant(sites, donor="runs/affect") ⇄ {"intervention": "Transplant", "sites": …, "donor": …}

Modules, recordings and lenses live in one process and have no JSON form; paths, hub ids and examples have.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, near
from affectlens.interventions.on_activations import Knockout, Mean, Resample, Steer
from affectlens.interventions.on_weights import Randomise, Scale, Shuffle, Zero
from affectlens.interventions.transplant import Transplant
from affectlens.lens import ActivationIntervention, Intervention
from affectlens.sites import Point, Points, Site, Sites
from affectlens.tasks import Example

Planned = Intervention | ActivationIntervention

# One row an intervention. `Patch` has none: its source is a recording or a lens.
KINDS: Mapping[str, Callable[..., Planned]] = {
    kind.__name__: kind
    for kind in (
        Knockout,
        Mean,
        Randomise,
        Resample,
        Scale,
        Shuffle,
        Steer,
        Transplant,
        Zero,
    )
}


def to_json(intervention: object) -> dict[str, Any]:
    """Return an intervention in JSON types. Raises `LensError` for one that holds what only this process has.

    >>> import affectlens as al
    >>> gate = al.Site("language", "gate_proj", layer=3)
    >>> to_json(al.Scale(gate, factor=0.5))["factor"]
    0.5
    """
    name = type(intervention).__name__
    if name not in KINDS or not is_dataclass(intervention):
        raise LensError(f"{name} has no JSON form. Interventions that have one: {near(name, KINDS)}")
    values = {field.name: getattr(intervention, field.name) for field in fields(intervention)}
    return {"intervention": name, **{key: _plain(value, f"{name}.{key}") for key, value in values.items()}}


def from_json(found: Mapping[str, Any]) -> Planned:
    """Return the intervention that `to_json` wrote. Raises `LensError` for an unknown name or field.

    >>> import affectlens as al
    >>> gate = al.Site("language", "gate_proj", layer=3)
    >>> from_json(to_json(al.Scale(gate, factor=0.5)))
    Scale(places=Sites(1: language gate_proj, layer 3), factor=0.5)
    """
    name = str(found.get("intervention"))
    if name not in KINDS:
        raise LensError(f"unknown intervention {name!r}. Interventions: {near(name, KINDS)}")
    try:
        values = {key: _value(value) for key, value in found.items() if key != "intervention"}
        return KINDS[name](**values)
    except (TypeError, KeyError) as error:
        raise LensError(f"{name} can't be made from these fields: {error}") from None


def _plain(value: object, what: str) -> object:
    if isinstance(value, Sites):
        return {"sites": [_without_defaults(site, Site) for site in value]}
    if isinstance(value, Points):
        return {"points": [[_without_defaults(p.site, Site), p.kind, _list(p.span)] for p in value]}
    if isinstance(value, Checkpoint):
        value = value.store.source or value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return {"vector": value.tolist()}
    if isinstance(value, tuple) and all(isinstance(one, Example) for one in value):
        return {"examples": [_without_defaults(one, Example) for one in value]}
    if value is None or isinstance(value, str | int | float | bool | tuple):
        return _list(value)
    raise LensError(
        f"{what} is a {type(value).__name__} of this process and has no JSON form; "
        "give a path, a hub id or examples"
    )


def _without_defaults(value: Any, kind: Any) -> dict[str, Any]:
    usual = {field.name: field.default for field in fields(kind)}
    changed = {key: one for key, one in asdict(value).items() if one != usual[key]}
    # Tuples become lists, so that the result equals what is read from its text.
    found: dict[str, Any] = json.loads(json.dumps(changed))
    return found


def _value(value: Any) -> Any:
    """Return a field's value: the reverse of `_plain`."""
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, entries),) = value.items()
        if kind == "sites":
            return Sites(Site(**entry) for entry in entries)
        if kind == "points":
            return Points(Point(Site(**site), at, _tuple(span)) for site, at, span in entries)
        if kind == "vector":
            return torch.tensor(entries)
        if kind == "examples":
            return tuple(
                Example(**{key: _media(key, one) for key, one in entry.items()}) for entry in entries
            )
    return _tuple(value)


def _media(key: str, value: Any) -> Any:
    if key not in ("images", "audio", "video", "messages"):
        return value
    return tuple(map(_tuple, value))


def _list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
