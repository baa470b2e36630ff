"""A selection as PEFT's `target_modules`: a pattern that matches its modules and no others."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from affectlens.errors import NoSuchSite
from affectlens.sites.site import Site

_KINDS = (".weight", ".bias")


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
