"""Sites: a selection that is a value, knows its size and never matches nothing in silence."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, overload

from affectlens.errors import NoSuchSite, WrongCount, near
from affectlens.sites.mlps import MLP
from affectlens.sites.points import Point, Points, Span, numbered
from affectlens.sites.roles import ATTENTION
from affectlens.sites.site import Site
from affectlens.sites.tree import drawn, layers, marked_up, nodes, spelt

Choice = str | int | Collection[Any] | Callable[[Any], bool] | None
_FIELDS = ("tower", "layer", "role", "stack", "expert", "param")
__all__ = ["GROUPS", "Sites", "layers"]
GROUPS = {"attention": ATTENTION, "mlp": MLP}
_KINDS = (".weight", ".bias")


class Sites(Sequence[Site]):
    """An ordered set of sites, which remembers what it was selected from.

    >>> sites = Sites([Site("language", "gate_proj", layer=i) for i in range(4)])
    >>> sites.where(layer=range(2)).expect(2)
    Sites(2: language gate_proj, layers 0-1)
    """

    def __init__(self, sites: Iterable[Site], *, within: "Sites | None" = None) -> None:
        self._sites = tuple(sorted(dict.fromkeys(sites)))
        self.within: Sites = within if within is not None else self

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
            # One that matches nothing among several that do is as wrong as one alone.
            listed = choice if isinstance(choice, list | tuple | set | frozenset) else ()
            lost = [one for one in listed if isinstance(one, str) and not any(_fits(n, one) for n in known)]
            if lost and kept:
                there = near(lost[0], known)
                raise NoSuchSite(f"no site has {name}={lost[0]!r}. {name.capitalize()}s here: {there}")
            if not kept:
                there = near(choice, known)
                raise NoSuchSite(f"no site has {name}={choice!r}. {name.capitalize()}s here: {there}")
        return Sites(kept, within=self.within)

    def expect(self, count: int) -> "Sites":
        """Return the selection if it has `count` sites; raise `WrongCount` if not."""
        if len(self) != count:
            raise WrongCount(f"expected {count} sites, there are {len(self)}: {self!r}")
        return self

    def at(self, kind: str, *, span: Span = None) -> Points:
        """The places in a forward pass that belong to these sites, at some positions or at all.

        `kind` is `"output"` or `"input"` of the module that the site is the weight of (of a fused one, its
        part of the output); `"pre_activation"`, the gate's output before its activation; `"gated"`,
        act(gate)·up, which goes into `down_proj`; `"heads"`, what goes into `o_proj`, head by head;
        `"residual"`, the stream as the layer leaves it. A head or neuron is its own features of these.

        `span` is a medium (`"image"`, `"audio"`, `"video"`), `"text"`, the `"prompt"`, its `"last"` token,
        what is `"generated"`, or numbers of an example's own tokens, negative ones from the prompt's end.
        Raises `NoSuchSite` for another kind or span.
        """
        return Points(Point(site, kind, numbered(span)) for site in self)

    def by(self, *names: str) -> dict[tuple[Any, ...], "Sites"]:
        """Group the sites by their fields, e.g. `by("role", "layer")`."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self._sites:
            groups.setdefault(tuple(getattr(site, name) for name in names), []).append(site)
        return {key: Sites(sites, within=self.within) for key, sites in groups.items()}

    def to_target_modules(self) -> str:
        """The selection as PEFT's `target_modules`: a pattern for exactly these modules.

        Raises `NoSuchSite` for a bare parameter, and for a part of a fused matrix without the rest.
        """
        return to_target_modules(self, self.within)

    def __or__(self, other: Iterable[Site]) -> "Sites":
        return Sites((*self._sites, *other), within=self.within)

    def __sub__(self, other: Iterable[Site]) -> "Sites":
        gone = set(other)
        return Sites((site for site in self._sites if site not in gone), within=self.within)

    def __and__(self, other: Iterable[Site]) -> "Sites":
        both = set(other)
        return Sites((site for site in self._sites if site in both), within=self.within)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> "Sites": ...
    def __getitem__(self, index: int | slice) -> "Site | Sites":
        found = self._sites[index]
        return found if isinstance(found, Site) else Sites(found, within=self.within)

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sites) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    def __repr__(self) -> str:
        groups = self.by("tower", "role")
        if len(groups) != 1:
            return "\n".join([f"Sites({len(self)})", *drawn(nodes(self), "  ")])
        (tower, role), span = next(iter(groups)), layers(self)
        return f"Sites({len(self)}: {tower} {role}" + (f", {spelt(span)})" if span else ")")

    def _repr_html_(self) -> str:
        return f"<b>{len(self)} sites</b>{marked_up(nodes(self))}"


def _fits(value: Any, choice: Any) -> bool:
    if callable(choice):
        return value is not None and bool(choice(value))
    if isinstance(choice, str) and choice in GROUPS:
        return value in GROUPS[choice]
    if isinstance(choice, Collection) and not isinstance(choice, str):
        return any(_fits(value, one) for one in choice)
    return bool(value == choice)


def to_target_modules(sites: Collection[Site], within: Iterable[Site]) -> str:
    """Write a regular expression for the modules of these sites, as the live model names them.

    PEFT matches a string against the whole name, while a list like `["gate_proj"]` matches endings and
    so takes the vision tower's gates along. Raises `NoSuchSite` for what PEFT can't adapt alone: a
    bare parameter (stacked experts), half of a fused matrix, a head. Where a file fuses what the live
    model keeps apart, take the sites from the lens.
    """
    if not sites:
        raise NoSuchSite("no site is selected, so there is no module to adapt")
    below = next((site for site in sites if site != site.at()), None)
    if below:
        raise NoSuchSite(f"{below} is a part of a matrix: adapters change whole modules")
    chosen = {site.parameter for site in sites}
    kept = set(sites)
    for site in within:
        if site.parameter in chosen and site not in kept:
            raise NoSuchSite(
                f"{site.parameter!r} holds {site} too, which is not selected: adapters change whole modules"
            )
    bare = sorted(name for name in chosen if not name.endswith(_KINDS))
    if bare:
        raise NoSuchSite(
            f"{bare[0]!r} is a bare parameter, not a module: give it to PEFT's target_parameters instead"
        )
    return _pattern({name.rpartition(".")[0] for name in chosen})


def _pattern(modules: Iterable[str]) -> str:
    """Names that differ in one number share an alternative: `layers.(0|1|2).mlp.gate_proj`."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        # The first number is the layer; a second one (an expert) stays written out.
        match = re.search(r"(?<=\.)\d+(?=\.|$)", module)
        start, stop = match.span() if match else (len(module), len(module))
        groups[module[:start], module[stop:]].append(module[start:stop])
    found = []
    for (head, tail), numbers in sorted(groups.items()):
        ordered = sorted(numbers, key=lambda n: int(n or -1))
        middle = ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"
        found.append(re.escape(head) + middle + re.escape(tail))
    return "|".join(found)
