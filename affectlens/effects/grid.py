"""The grid of a sweep: groups of sites × actions, and the draws of the null that they are compared with."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from affectlens.checkpoints import Checkpoint, Source
from affectlens.errors import TableError, near
from affectlens.sites import ATTENTION, MLP, Site, Sites

ACTIONS = ("transplant", "revert", "zero")
_BY = ("site", "role", "layer", "tower")


@dataclass(frozen=True)
class GridUnit:
    """One intervention of a sweep: an action on some sites, and its part in the comparison."""

    action: str
    name: str
    sites: Sites
    kind: str = "effect"
    null_of: str = ""  # the family of roles that its null is drawn from, or that this draw is from
    seed: int | None = None


@dataclass(frozen=True)
class Grid:
    """Groups of sites × actions: the plan of a sweep.

    - `by`: `"site"`, `"role"`, `"layer"`, `"tower"`, a comma-separated mix, or your own mapping from names to
      sites
    - `actions`: `transplant` puts the donor's weights into base, `revert` puts base's weights into the donor,
      `zero` sets the donor's weights to zero
    - `control`: another tuning of the same base, transplanted at the same sites
    - `n_random`: draws of the layer-stratified null, for each action but `zero`. A draw picks in each layer
      one of the roles of equal size, so only a group that is one role in all layers that moved has a null

    Raises `TableError` for an unknown action or grouping.

    >>> import affectlens as al
    >>> base, tuned, *_ = al.load_demo()
    >>> grid = al.Grid(base.sites.where(tower="language"), by="role", donor=tuned, n_random=0)
    >>> sorted(grid.groups(base.sites.where(role="mlp")))
    ['down_proj', 'gate_proj', 'up_proj']
    """

    sites: Sites
    by: str | Mapping[str, Sites] = "role"
    actions: tuple[str, ...] = ("transplant", "revert")
    donor: Source = field(kw_only=True)
    control: Source | None = field(default=None, kw_only=True)
    n_random: int = field(default=20, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) and "all" in self.by:
            raise TableError("a group can't be called 'all', the name of the whole change. Rename it")
        for action in self.actions:
            if action not in ACTIONS:
                raise TableError(f"unknown action {action!r}. Actions: {near(action, ACTIONS)}")
        names = self._names()
        for name in names:
            if name not in _BY:
                raise TableError(f"can't group sites by {name!r}. By: {near(name, _BY)}")
        if "site" in names and len(names) > 1:
            raise TableError("by='site' is the finest grouping. Leave the others out")
        for chosen in (self.actions, names):
            if len(set(chosen)) < len(chosen):
                raise TableError(f"each may be given once, got {', '.join(chosen)}")
        if self.n_random < 0:
            raise TableError(f"n_random must be 0 or more, got {self.n_random}")

    def units(self, moved: Sites, live: Checkpoint, *, control: Sites | None = None) -> Iterator[GridUnit]:
        """Yield the interventions at the sites that moved; at the others they would change nothing.

        `control` holds the sites that the control tuning has too; a group with other sites gets no control.
        """
        scope = moved & self.sites
        families = _families(scope, live)
        used = set()
        for name, sites in self.groups(moved).items():
            family = next((f for f, roles in families.items() if _is_role(sites, roles, scope=scope)), "")
            used.add(family)
            for action in self.actions:
                yield GridUnit(action, name, sites, null_of=family)
            if control is not None and "transplant" in self.actions and not sites - control:
                yield GridUnit("transplant", name, sites, kind="control-tuning")
        for family, roles in families.items():
            if family in used:
                yield from self._null(family, _by_layer(scope, roles))

    def groups(self, moved: Sites) -> dict[str, Sites]:
        """Return the groups by name, without the sites that did not move."""
        if not isinstance(self.by, str):
            return {name: kept for name, sites in self.by.items() if (kept := sites & moved)}
        names = self._names()
        if "site" in names:
            return {str(site): Sites([site]) for site in moved & self.sites}
        groups = (moved & self.sites).by("tower", *names)
        return {_label(key[0], key[1:]): sites for key, sites in groups.items()}

    def _names(self) -> list[str]:
        return [name.strip() for name in self.by.split(",")] if isinstance(self.by, str) else []

    def _null(self, family: str, layers: list[list[Sites]]) -> Iterator[GridUnit]:
        # Seeded for each family, so that its draws do not depend on which others there are.
        rng = np.random.default_rng(self.seed)
        for draw in range(self.n_random):
            picked = [choices[rng.integers(len(choices))] for choices in layers]
            sites = Sites(itertools.chain.from_iterable(picked))
            for action in self.actions:
                if action != "zero":
                    yield GridUnit(action, f"{family} #{draw}", sites, "random-control", family, self.seed)


def _label(tower: str, rest: tuple[Any, ...]) -> str:
    words = [str(value) for value in rest if value is not None and value != tower]
    return ".".join(words if tower == "language" and words else [tower, *words])


def _families(moved: Sites, live: Checkpoint) -> dict[str, frozenset[str]]:
    """Return the roles of the language model that can replace each other: equal sizes in every layer."""
    families: dict[str, frozenset[str]] = {}
    for name, roles in (("mlp", MLP), ("attention", ATTENTION)):
        sizes: dict[tuple[tuple[int | None, int], ...], list[str]] = {}
        for role in roles:
            sites = [s for s in moved if _eligible(s) and s.role == role and s.param == "weight"]
            if sites:
                key = tuple((site.layer, live.storage[site].size) for site in sites)
                sizes.setdefault(key, []).append(role)
        for alike in sizes.values():
            if len(alike) > 1:
                whole = len(alike) == len(roles)
                families[name if whole else "/".join(alike)] = frozenset(alike)
    return families


def _eligible(site: Site) -> bool:
    own = site.tower == "language" and site.layer is not None
    return own and site.expert is None and not site.label


def _is_role(sites: Sites, roles: frozenset[str], *, scope: Sites) -> bool:
    """Check that a group is one of the roles in all its layers, as each draw is."""
    role = sites[0].role
    whole = Sites(site for site in scope if _eligible(site) and site.role == role)
    return role in roles and sites == whole and len({site.layer for site in sites}) > 1


def _by_layer(moved: Sites, roles: frozenset[str]) -> list[list[Sites]]:
    groups = Sites(s for s in moved if _eligible(s) and s.role in roles).by("layer", "role")
    layers: dict[Any, list[Sites]] = {}
    for (layer, _), sites in groups.items():
        layers.setdefault(layer, []).append(sites)
    return list(layers.values())
