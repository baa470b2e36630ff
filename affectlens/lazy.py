"""Names resolved when first used (PEP 562), so that showing a table does not import torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def resolver(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a package's `__getattr__`: `home` says which of its modules holds each public name."""

    def resolve(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return resolve
