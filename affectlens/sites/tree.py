"""Draw a selection as a tree: tower, stack, the roles outside of layers, the roles in each layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from affectlens import html, printable
from affectlens.sites.site import Site

Size = Callable[[Site], int]


class Node(NamedTuple):
    """A line of the tree, and the lines below it."""

    name: str
    note: str
    below: tuple["Node", ...] = ()


def nodes(sites: Iterable[Site], size: Size | None = None) -> tuple[Node, ...]:
    """Group sites into a tree. Its notes add up the `size` of the sites, or count them if None."""
    found = []
    for tower, inside in _grouped(sites, lambda site: site.tower):
        below: list[Node] = []
        for stack, part in _grouped(inside, lambda site: site.stack):
            branches = tuple(_branches(part, size))
            below += [Node(str(stack), _note(part, size), branches)] if stack else branches
        found.append(Node(str(tower), _note(inside, size), tuple(below)))
    return tuple(found)


def drawn(tree: Iterable[Node], indent: str = "") -> Iterator[str]:
    """Draw nodes as lines of text, with the notes in a second column."""
    flat = list(_flat(tree, indent))
    width = max((len(name) for name, _ in flat), default=0)
    for name, note in flat:
        yield f"{printable.plain(name).ljust(width)}  {printable.plain(note)}"


def marked_up(tree: Iterable[Node]) -> str:
    """Draw nodes as HTML that can be folded; every name is escaped."""
    return "".join(map(_details, tree))


def layers(sites: Iterable[Site]) -> str:
    """Write the layers of some sites as ranges.

    >>> layers([Site("language", "gate_proj", layer=i) for i in (0, 1, 2, 5)])
    '0-2, 5'
    """
    runs: list[list[int]] = []  # first and last layer of each
    for layer in sorted({site.layer for site in sites if site.layer is not None}):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def layer_words(spans: str) -> str:
    """Write `layer 3` or `layers 0-5`."""
    return f"layer {spans}" if spans.isdigit() else f"layers {spans}"


def _branches(sites: Sequence[Site], size: Size | None) -> Iterator[Node]:
    outside = [site for site in sites if site.layer is None]
    yield from _roles(outside, size)
    inside = [site for site in sites if site.layer is not None]
    if inside:
        note = _note(inside, size)
        yield Node(layer_words(layers(inside)), note, tuple(_roles(inside, size)))


def _roles(sites: Sequence[Site], size: Size | None) -> Iterator[Node]:
    for role, found in _grouped(sites, lambda site: site.role):
        experts = {site.expert for site in found if site.expert is not None}
        extra = f", {len(experts)} experts" if experts else ""
        spans = layers(found)
        whole = {site.layer for site in found} == {site.layer for site in sites}
        # The line above says which layers there are; a role that is in all of them need not repeat it.
        extra += f", {layer_words(spans)}" if spans and not whole else ""
        yield Node(str(role), _note(found, size) + extra)


def _grouped(sites: Iterable[Site], key: Callable[[Site], object]) -> list[tuple[object, list[Site]]]:
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return list(groups.items())


def _note(sites: Sequence[Site], size: Size | None) -> str:
    if size is not None:
        return f"{sum(size(site) for site in sites):,}"
    return f"{len(sites)} site" + ("" if len(sites) == 1 else "s")


def _flat(tree: Iterable[Node], indent: str) -> Iterator[tuple[str, str]]:
    for node in tree:
        yield indent + node.name, node.note
        yield from _flat(node.below, indent + "  ")


def _details(node: Node) -> str:
    line = f"{html.escape(node.name)} <small>{html.escape(node.note)}</small>"
    if not node.below:
        return f'<div style="margin-left:1.5em">{line}</div>'
    return f'<details open style="margin-left:1em"><summary>{line}</summary>{marked_up(node.below)}</details>'
