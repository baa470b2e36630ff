"""Interventions as JSON and back: a plan that can be written down, sent, and carried out elsewhere.

    Transplant(sites, donor="runs/affect") ⇄ {"intervention": "Transplant", "sites": …, "donor": …}

What lives in this process alone (a module, a recording, another lens) has no JSON; its source has.
"""

import json
from collections.abc import Mapping
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
from affectlens.sites import Point, Points, Site, Sites
from affectlens.tasks import Example

_KINDS: Mapping[str, Any] = {
    kind.__name__: kind
    for kind in (Knockout, Mean, Randomise, Resample, Scale, Shuffle, Steer, Transplant, Zero)
}


def to_json(intervention: Any) -> dict[str, Any]:
    """An intervention as what JSON can hold. Raises `LensError` for one that holds what is no source."""
    name = type(intervention).__name__
    if name not in _KINDS or not is_dataclass(intervention):
        raise LensError(f"{name} can't be written down. Those that can: {near(name, _KINDS)}")
    values = {field.name: getattr(intervention, field.name) for field in fields(intervention)}
    return {"intervention": name, **{key: _plain(value, f"{name}.{key}") for key, value in values.items()}}


def from_json(found: Mapping[str, Any]) -> Any:
    """The intervention that `to_json` wrote down. Raises `LensError` for what is none."""
    name = str(found.get("intervention"))
    if name not in _KINDS:
        raise LensError(f"{name!r} is no intervention. Interventions: {near(name, _KINDS)}")
    try:
        values = {key: _whole(value) for key, value in found.items() if key != "intervention"}
        return _KINDS[name](**values)
    except (TypeError, KeyError) as error:
        raise LensError(f"{name}: {error} does not fit what it takes") from None


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, Sites):
        return {"sites": [_without_defaults(site, Site) for site in value]}
    if isinstance(value, Points):
        return {"points": [[_without_defaults(p.site, Site), p.kind, _listed(p.span)] for p in value]}
    if isinstance(value, Checkpoint):
        value = value.store.source or value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return {"vector": value.tolist()}
    if isinstance(value, tuple) and all(isinstance(one, Example) for one in value):
        return {"examples": [_without_defaults(one, Example) for one in value]}
    if value is None or isinstance(value, str | int | float | bool | tuple):
        return _listed(value)
    raise LensError(f"{what} is a {type(value).__name__} of this process; give a path or hub id, or examples")


def _without_defaults(value: Any, kind: Any) -> dict[str, Any]:
    usual = {field.name: field.default for field in fields(kind)}
    found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in asdict(value).items() if v != usual[k]}))
    return found  # with lists for tuples, as it will be read


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, entries),) = value.items()
        if kind == "sites":
            return Sites(Site(**entry) for entry in entries)
        if kind == "points":
            return Points(Point(Site(**site), at, _span(span)) for site, at, span in entries)
        if kind == "vector":
            return torch.tensor(entries)
        if kind == "examples":
            return tuple(
                Example(**{key: _media(key, one) for key, one in entry.items()}) for entry in entries
            )
    return _span(value)


def _media(key: str, value: Any) -> Any:
    if key not in ("images", "audio", "video", "messages"):
        return value
    return tuple(tuple(one) if isinstance(one, list) else one for one in value)


def _span(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
