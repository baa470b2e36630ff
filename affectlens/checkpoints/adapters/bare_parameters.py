"""Factors of bare parameters, such as stacked experts: which parameter they change, and by what.

PEFT's `target_parameters` nests one wrapper for each parameter of a module and saves no names, so their
shapes say which factors belong to which parameter. Experts share two tensors: rows of A are sorted by expert,
columns of B by rank (`ParamWrapper.get_delta_weight` of PEFT).
"""

from collections.abc import Mapping
from itertools import permutations
from typing import NamedTuple

from affectlens.checkpoints.adapters.factor_names import Pair
from affectlens.checkpoints.adapters.low_rank import Expert, LowRank
from affectlens.checkpoints.adapters.recipes import Recipe
from affectlens.checkpoints.checkpoint import Checkpoint, context_of
from affectlens.checkpoints.store import Store
from affectlens.sites import Cut, Site, Storage, bare_name, canonical, model_type

_MOST = 4  # parameters of a module; every order of them is tried
_UNCLEAR = "factors of a bare parameter (target_parameters), whose shapes don't say which one it is"
# Model types whose experts tell PEFT that they are stored (in, out).
_TELLS = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")


class BareChanges(NamedTuple):
    """The changes of bare parameters, the tensors left out with the reason, and the sites these change."""

    factors: dict[Site, LowRank]
    skipped: dict[str, str]
    unknown: frozenset[Site]


class _Bare(NamedTuple):
    """A parameter of a live module: its sites with their rows, and the shape (out, in) of one expert."""

    name: str
    parts: Mapping[Site, Cut | None]
    experts: int
    out: int
    into: int
    transposed: bool  # stored (in, out)


def bare_changes(
    store: Store, root: Checkpoint, *, nested: Mapping[str, list[Pair]], recipe: Recipe
) -> BareChanges:
    """Return the changes by the factors of bare parameters; `nested` has those of each module."""
    factors: dict[Site, LowRank] = {}
    skipped: dict[str, str] = {}
    unknown: set[Site] = set()
    tells = model_type(root.config) in _TELLS
    parameters = _parameters(root, list(nested), recipe)
    for module, pairs in nested.items():
        there = parameters[module]
        turns = _matched(store, pairs, there, tells)
        if turns is None:
            skipped |= {name: _UNCLEAR for pair in pairs for name in (pair.a, pair.b)}
            unknown |= {site for one in there for site in one.parts}
            continue
        rules = recipe.of([one.name for one, _ in turns], store.name)
        for pair, (one, turned) in zip(pairs, turns, strict=True):
            rank = store.headers[pair.a].shape[0] // one.experts
            scale = recipe.scales.get(pair.a, rules[one.name].scale(rank))
            for site, cut in one.parts.items():
                expert = Expert(site.expert or 0, one.experts, turned)
                where = Storage("", root.shape(site), cut=cut)
                factors[site] = LowRank(store, pair, where, scale, rank, expert)
    return BareChanges(factors, skipped, frozenset(unknown))


def _parameters(root: Checkpoint, modules: list[str], recipe: Recipe) -> dict[str, list[_Bare]]:
    """Return the parameters of each module that the config names."""
    if not modules:
        return {}
    leaves = sorted({target.rpartition(".")[2] for target in recipe.parameters})
    every = [f"{module}.{leaf}" for module in modules for leaf in leaves]
    names = canonical([*every, *context_of(root)], root.config)
    sites: dict[str, list[Site]] = {}
    for site in root.storage:
        sites.setdefault(site.parameter, []).append(site)
    found: dict[str, list[_Bare]] = {module: [] for module in modules}
    for module in modules:
        for leaf in leaves:
            named, own = f"{bare_name(module)}.{leaf}", sites.get(names[f"{module}.{leaf}"])
            wanted = any(named == target or named.endswith(f".{target}") for target in recipe.parameters)
            if wanted and own:
                found[module].append(_bare(root, named, own))
    return found


def _bare(root: Checkpoint, name: str, sites: list[Site]) -> _Bare:
    experts = len({site.expert for site in sites})
    first = [site for site in sites if site.expert == sites[0].expert]
    first.sort(key=lambda site: (root.at(site).cut or Cut(0, 0, 0)).start)
    starts, rows = {}, 0
    for site in first:  # of one that a file stores in parts, gate comes before up, as in the order of sites
        starts[site.role], rows = rows, rows + root.shape(site)[0]
    parts: dict[Site, Cut | None] = {}
    for site in sites:
        cut, start = root.at(site).cut, starts[site.role]
        own = Cut(0, start, start + root.shape(site)[0]) if len(first) > 1 else None
        parts[site] = cut._replace(dim=0) if cut is not None else own
    shape = root.shape(sites[0])
    return _Bare(name, parts, experts, rows, shape[-1], root.at(sites[0]).transposed)


def _matched(
    store: Store, pairs: list[Pair], there: list[_Bare], tells: bool
) -> list[tuple[_Bare, bool]] | None:
    """Return the parameter of each pair and whether B·A is transposed; None unless there is one way."""
    if len(pairs) != len(there) or len(there) > _MOST:
        return None
    ways = []
    for order in permutations(there):
        turns = [_turned(store, pair, one, tells) for pair, one in zip(pairs, order, strict=True)]
        if None not in turns:
            ways.append([(one, bool(turn)) for one, turn in zip(order, turns, strict=True)])
    return ways[0] if len(ways) == 1 else None


def _turned(store: Store, pair: Pair, one: _Bare, tells: bool) -> bool | None:
    """Return whether B·A of an expert is its change transposed; None if it doesn't fit."""
    a, b = store.headers[pair.a].shape, store.headers[pair.b].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % one.experts:
        return None
    made, change = (b[0], a[1]), (one.out, one.into)
    if made not in (change, change[::-1]):
        return None
    return made != change if change != change[::-1] else one.transposed and not tells
