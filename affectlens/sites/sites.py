"""Sites: a selection that is a value, knows its size and never matches nothing in silence."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, overload

from affectlens import html
from affectlens.errors import NoSuchSite, WrongCount, near
from affectlens.sites.roles import ATTENTION, MLP
from affectlens.sites.site import Site

Choice = str | int | Collection[Any] | Callable[[Any], bool] | None
_FIELDS = ("tower", "layer", "role", "stack", "expert", "param")
GROUPS = {"attention": ATTENTION, "mlp": MLP}


class Sites(Sequence[Site]):
    """An ordered set of sites.

    >>> sites = Sites([Site("language", "gate_proj", layer=i) for i in range(4)])
    >>> sites.where(layer=range(2)).expect(2)
    Sites(2: language gate_proj, layers 0-1)
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = tuple(sorted(dict.fromkeys(sites)))

    def where(
        self,
        *,
        tower: Choice = None,
        layer: Choice = None,
        role: Choice = None,
        stack: Choice = None,
        expert: Choice = None,
        param: Choice = None,
    ) -> "Sites":
        """Keep the sites that fit: each argument is a value, a collection or a function.

        `role` also takes the groups `"attention"` and `"mlp"`. Raises `NoSuchSite`, with what is
        there and the nearest name, when nothing fits.
        """
        asked = (tower, layer, role, stack, expert, param)
        kept = self._sites
        for name, choice in zip(_FIELDS, asked, strict=True):
            if choice is None:
                continue
            known = sorted({getattr(site, name) for site in kept}, key=str)
            kept = tuple(site for site in kept if _fits(getattr(site, name), choice))
            if not kept:
                there = near(choice, known)
                raise NoSuchSite(f"no site has {name}={choice!r}. {name.capitalize()}s here: {there}")
        return Sites(kept)

    def expect(self, count: int) -> "Sites":
        """Return the selection if it has `count` sites; raise `WrongCount` if not."""
        if len(self) != count:
            raise WrongCount(f"expected {count} sites, there are {len(self)}: {self!r}")
        return self

    def by(self, *names: str) -> dict[tuple[Any, ...], "Sites"]:
        """Group the sites by their fields, e.g. `by("role", "layer")`."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self._sites:
            groups.setdefault(tuple(getattr(site, name) for name in names), []).append(site)
        return {key: Sites(sites) for key, sites in groups.items()}

    def __or__(self, other: Iterable[Site]) -> "Sites":
        return Sites((*self._sites, *other))

    def __sub__(self, other: Iterable[Site]) -> "Sites":
        gone = set(other)
        return Sites(site for site in self._sites if site not in gone)

    def __and__(self, other: Iterable[Site]) -> "Sites":
        both = set(other)
        return Sites(site for site in self._sites if site in both)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> "Sites": ...
    def __getitem__(self, index: int | slice) -> "Site | Sites":
        found = self._sites[index]
        return found if isinstance(found, Site) else Sites(found)

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sites) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    def __repr__(self) -> str:
        return f"Sites({len(self)}: {'; '.join(_lines(self))})" if self._sites else "Sites(0)"

    def _repr_html_(self) -> str:
        rows = [
            (tower, role, len(sites), layers(sites))
            for (tower, role), sites in self.by("tower", "role").items()
        ]
        return html.table(("tower", "role", "sites", "layers"), rows, caption=f"{len(self)} sites")


def layers(sites: Iterable[Site]) -> str:
    """Write the layers of some sites as ranges.

    >>> layers([Site("language", "gate_proj", layer=i) for i in (0, 1, 2, 5)])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for layer in sorted({site.layer for site in sites if site.layer is not None}):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _lines(sites: Sites) -> Iterator[str]:
    for (tower, role), group in list(sites.by("tower", "role").items())[:12]:
        span = layers(group)
        yield f"{tower} {role}" + (f", layers {span}" if span else "")


def _fits(value: Any, choice: Any) -> bool:
    if callable(choice):
        return value is not None and bool(choice(value))
    if isinstance(choice, str) and choice in GROUPS:
        return value in GROUPS[choice]
    if isinstance(choice, Collection) and not isinstance(choice, str):
        return any(_fits(value, one) for one in choice)
    return bool(value == choice)
