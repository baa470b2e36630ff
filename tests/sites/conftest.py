"""Every architecture that the installed transformers can build, without weights and with two layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch

from affectlens.sites import Laid, Site, Storage, lay_out
from affectlens.sites.locating import sites_of
from affectlens.sites.site import Shape
from benchmarks.conversions import Rule, architectures, build, memory, renamings


@dataclass(frozen=True)
class Architecture:
    """An architecture in both layouts."""

    kind: str
    name: str
    config: Mapping[str, Any]
    memory: Mapping[str, Shape]
    disk: Mapping[str, Shape]
    classes: Mapping[str, str]  # the class of the module that owns each parameter
    around: Mapping[str, type]  # the class of that module's parent
    rules: list[Rule]

    @cached_property
    def laid(self) -> Mapping[str, Laid]:
        """The tensors in memory, described."""
        return lay_out(self.memory, self.config)

    @property
    def sites(self) -> tuple[Mapping[Site, Storage], Mapping[Site, Storage]]:
        """The sites in memory and on disk."""
        return sites_of(self.laid), sites_of(lay_out(self.disk, self.config))


@pytest.fixture(scope="session")
def zoo() -> list[Architecture]:
    return [found for kind, name in architectures() if (found := seen(kind, name))]


def seen(kind: str, name: str) -> Architecture | None:
    from transformers.core_model_loading import revert_weight_conversion

    model = build(kind, name)
    if model is None:
        return None
    modules = dict(model.named_modules())
    names = memory(model)
    saved = revert_weight_conversion(model, {n: torch.empty(s, device="meta") for n, s in names.items()})
    owners = {n: n.rpartition(".")[0] for n in names}
    return Architecture(
        kind,
        name,
        {**model.config.to_dict(), "model_type": kind, "architectures": [name]},
        names,
        {n: tuple(t.shape) for n, t in saved.items()},
        {n: type(modules[owner]).__name__ for n, owner in owners.items()},
        {n: type(modules[o.removesuffix(".linear").rpartition(".")[0]]) for n, o in owners.items()},
        renamings(model),
    )
