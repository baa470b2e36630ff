"""Every architecture that the installed transformers can build, without weights and with two layers."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from affectlens.sites.storage import Shape
from benchmarks.conversions import Rule, architectures, build, renamings


@dataclass(frozen=True)
class Architecture:
    """One of them, in both layouts."""

    kind: str
    name: str
    config: Mapping[str, Any]
    memory: Mapping[str, Shape]
    disk: Mapping[str, Shape]
    classes: Mapping[str, str]  # of the module that has each parameter
    sources: Mapping[str, str]  # the code of the module around that one
    rules: list[Rule]


@pytest.fixture(scope="session")
def zoo() -> list[Architecture]:
    return [found for kind, name in architectures() if (found := seen(kind, name))]


def seen(kind: str, name: str) -> Architecture | None:
    from transformers.core_model_loading import revert_weight_conversion

    model = build(kind, name)
    if model is None:
        return None
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    modules = dict(model.named_modules())
    memory = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in tied}
    saved = revert_weight_conversion(model, {n: torch.empty(s, device="meta") for n, s in memory.items()})
    owners = {n: n.rpartition(".")[0] for n in memory}
    return Architecture(
        kind,
        name,
        {**model.config.to_dict(), "model_type": kind, "architectures": [name]},
        memory,
        {n: tuple(t.shape) for n, t in saved.items()},
        {n: type(modules[owner]).__name__ for n, owner in owners.items()},
        {
            n: source(type(modules[owner.removesuffix(".linear").rpartition(".")[0]]))
            for n, owner in owners.items()
        },
        renamings(model),
    )


def source(kind: type) -> str:
    if kind not in SOURCES:
        SOURCES[kind] = inspect.getsource(kind)
    return SOURCES[kind]


SOURCES: dict[type, str] = {}
