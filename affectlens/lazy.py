"""Resolve public names when they are first used (PEP 562), so that importing a package stays fast."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def resolver(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package; `home` maps each public name to the module that holds it."""

    def resolve(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return resolve
