"""Sites: a selection of parameters; it is a value, and an empty selection is an error."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, overload

from affectlens.errors import NoSuchSite, WrongCount, unmatched
from affectlens.sites.mlps import MLP
from affectlens.sites.points import Point, Points, Span, numbered
from affectlens.sites.roles import ATTENTION
from affectlens.sites.site import Site
from affectlens.sites.tree import drawn, layer_words, layers, marked_up, nodes

Choice = str | int | Collection[Any] | Callable[[Any], bool] | None
_FIELDS = ("tower", "layer", "role", "stack", "expert", "param")
GROUPS = {"attention": ATTENTION, "mlp": MLP}
_KINDS = (".weight", ".bias")


class Sites(Sequence[Site]):
    """An ordered set of sites that remembers the larger set it was selected from.

    >>> sites = Sites([Site("language", "gate_proj", layer=i) for i in range(4)])
    >>> sites.where(layer=range(2)).expect(2)
    Sites(2: language gate_proj, layers 0-1)
    """

    def __init__(self, sites: Iterable[Site], *, within: "Sites | None" = None) -> None:
        # Sorted, so that two equal selections print, hash and sweep in the same order.
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
        """Keep the sites that match every argument: a value, a collection of values, or a function.

        `role` also takes the groups `"attention"` and `"mlp"`. Raises `NoSuchSite` if no site matches, or
        none matches a name in a list; the error lists the values that exist, and the closest name.
        """
        asked = (tower, layer, role, stack, expert, param)
        kept = self._sites
        for name, choice in zip(_FIELDS, asked, strict=True):
            if choice is None:
                continue
            known = sorted({getattr(site, name) for site in kept}, key=_in_order)
            kept = tuple(site for site in kept if _fits(getattr(site, name), choice))
            # A misspelt name in a list is an error even if the other names match.
            listed = choice if isinstance(choice, list | tuple | set | frozenset) else ()
            lost = [one for one in listed if isinstance(one, str) and not any(_fits(n, one) for n in known)]
            if lost or not kept:
                wrong = lost[0] if lost else choice
                title = f"{name.capitalize()}s here"
                raise NoSuchSite(unmatched("site", name, choice=wrong, known=known, title=title))
        return Sites(kept, within=self.within)

    def expect(self, count: int) -> "Sites":
        """Return the selection if it has `count` sites; raise `WrongCount` if not."""
        if len(self) != count:
            raise WrongCount(f"expected {count} sites, got {len(self)}: {self!r}")
        return self

    def at(self, kind: str, *, span: Span = None) -> Points:
        """Select places in a forward pass: an activation at each of these sites, at some token positions.

        `kind` is `"output"` or `"input"` of the module whose weight the site is (of a fused module: the
        site's part of the output); `"pre_activation"`, the output of the gate before its activation;
        `"gated"`, act(gate)·up, the input of `down_proj`; `"heads"`, the input of `o_proj`, head by head;
        `"residual"`, the residual stream after the layer (of Gemma-3n all streams, their features side by
        side). A head or neuron selects its own features.

        `span` is a medium (`"image"`, `"audio"`, `"video"`), one item of it (`"image:2"`, the second picture
        of an example), a tile or frame of that (`"image:2/tile:1"`, `"video:1/frame:3"`), `"text"`, a word of
        the text wherever it occurs (`"text:sad"`), the `"prompt"`, its `"last"` token, the `"generated"`
        tokens, or numbers of an example's tokens, negative ones counted from the end of the prompt; None
        selects all positions. At the output of the input embedding, a medium means what enters the first
        layer, where it has replaced its placeholders. Raises `NoSuchSite` for another kind or span.
        """
        return Points(Point(site, kind, numbered(span)) for site in self)

    def by(self, *names: str) -> dict[tuple[Any, ...], "Sites"]:
        """Group the sites by their fields, e.g. `by("role", "layer")`."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self._sites:
            groups.setdefault(tuple(getattr(site, name) for name in names), []).append(site)
        return {key: Sites(sites, within=self.within) for key, sites in groups.items()}

    def to_target_modules(self) -> str:
        """Write PEFT's `target_modules`: a pattern that matches exactly the modules of these sites.

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
        return f"Sites({len(self)}: {tower} {role}" + (f", {layer_words(span)})" if span else ")")

    def _repr_html_(self) -> str:
        return f"<b>{len(self)} sites</b>{marked_up(nodes(self))}"


def _in_order(value: str | int | None) -> tuple[bool, int, str]:
    # Layers by number, not by their digits; None, for sites outside of layers, comes last.
    return (value is None, value if isinstance(value, int) else 0, str(value))


def _fits(value: Any, choice: Any) -> bool:
    if callable(choice):
        # A function of layers need not expect the None of sites outside of layers.
        return value is not None and bool(choice(value))
    if isinstance(choice, str) and choice in GROUPS:
        return value in GROUPS[choice]
    if isinstance(choice, Collection) and not isinstance(choice, str):
        return any(_fits(value, one) for one in choice)
    return bool(value == choice)


def to_target_modules(sites: Collection[Site], within: Iterable[Site]) -> str:
    """Write a regular expression for the modules of these sites, with their names in the live model.

    PEFT matches a string against the whole name. It matches a list like `["gate_proj"]` against the end of
    the name, which would include the gates of the vision tower. Raises `NoSuchSite` for a part that PEFT
    can't adapt alone: a bare parameter (stacked experts), half of a fused matrix, a head. If the file fuses
    matrices that the live model keeps apart, take the sites from the lens.
    """
    if not sites:
        raise NoSuchSite("no site is selected, so there is no module to adapt")
    below = next((site for site in sites if site != site.at()), None)
    if below:
        raise NoSuchSite(
            f"{below} is a part of a matrix, but adapters change whole modules. Select {below.at()}"
        )
    chosen = {site.parameter for site in sites}
    kept = set(sites)
    # An adapter changes a whole module, so every part of a fused one must be selected.
    for site in within:
        if site.parameter in chosen and site not in kept:
            raise NoSuchSite(
                f"{site.parameter!r} also holds {site}, which is not selected, but adapters change whole "
                "modules. Select it too"
            )
    bare = sorted(name for name in chosen if not name.endswith(_KINDS))
    if bare:
        raise NoSuchSite(
            f"{bare[0]!r} is a bare parameter, not a module: give it to PEFT's target_parameters instead"
        )
    return _pattern({name.rpartition(".")[0] for name in chosen})


def _pattern(modules: Iterable[str]) -> str:
    """Write one alternative for names that differ in one number: `layers.(0|1|2).mlp.gate_proj`."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        # The first number is the layer. A second one, an expert, is written out.
        match = re.search(r"(?<=\.)\d+(?=\.|$)", module)
        start, stop = match.span() if match else (len(module), len(module))
        groups[module[:start], module[stop:]].append(module[start:stop])
    found = []
    for (head, tail), numbers in sorted(groups.items()):
        ordered = sorted(numbers, key=lambda n: int(n or -1))
        middle = ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"
        found.append(re.escape(head) + middle + re.escape(tail))
    return "|".join(found)
