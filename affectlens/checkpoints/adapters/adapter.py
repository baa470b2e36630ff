"""An adapter over its base as one checkpoint of effective weights.

Each factor pair is laid out by name as the parameter that it changes, beside those of base. Tensors without
a place in base are never dropped silently: they get a site of their own, or are skipped with the reason.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from affectlens.checkpoints.adapters.factor_names import Checked, Pair, checked, made, owner_of
from affectlens.checkpoints.adapters.recipes import Recipe
from affectlens.checkpoints.adapters.token_rows import TokenRowsStore, token_numbers
from affectlens.checkpoints.checkpoint import AdapterChange, Checkpoint, context_of
from affectlens.checkpoints.store import Header, JoinedStore, Store
from affectlens.checkpoints.tying import VOCABULARY, sharing
from affectlens.errors import CheckpointError, NothingToCompare, quoted
from affectlens.sites import Site, Sites, Storage, bare_name, canonical, lay_out, sites_of

if TYPE_CHECKING:
    from affectlens.checkpoints.adapters.low_rank import LowRank

Shape = tuple[int, ...]
_NOT_IN_BASE = "changes a parameter that base does not have"
_SAME = "the factors of the input embedding again, which base ties to the output embedding"
Skipped = dict[str, tuple[str, int]]


class _Factors(NamedTuple):
    """The changes by factors, what was skipped, the sites that it changes, and base as they change it."""

    factors: dict[Site, "LowRank"]
    skipped: Skipped
    unknown: frozenset[Site]
    base: Checkpoint


def adapted(store: Store, base: Checkpoint, *, recipe: Recipe) -> Checkpoint:
    """Lay the tensors of an adapter over `base`, or over the base of `base` if that is an adapter too.

    Raises `CheckpointError` for factors that don't fit, and `NothingToCompare` if nothing has a place.
    """
    # An adapter replaces the one on `base`: their changes are not added up.
    root = base.change.base if base.change else base
    known = checked(store, recipe)
    found = known.tensors
    factors, skipped, unknown, root = _factors(store, root, known, recipe)
    rest = {**found.rest, **_copies(root, known, recipe)}
    skipped |= {name: (why, _size(store, name)) for name, why in rest.items()}
    # Tensors saved whole are laid out like those of any checkpoint.
    saved: dict[str, tuple[Store, str]] = {
        owner: (store, name) for name, owner in found.whole.items() if name not in rest
    }
    saved |= dict(_rows(store, root, found.rows, recipe))
    shapes = {owner: holder.headers[name].shape for owner, (holder, name) in saved.items()}
    laid = lay_out(shapes, root.config, context=context_of(root))
    # With the adapter's name, since base may store a tensor of the same name.
    key = {owner: f"{store.name}:{found.rows.get(owner, name)}" for owner, (_, name) in saved.items()}
    whole = {
        site: where._replace(tensor=key[where.tensor]) for site, where in sites_of(laid, store.name).items()
    }
    for site, where in whole.items():
        if site in factors and where.tensor.removeprefix(f"{store.name}:") in found.rows.values():
            reason = "rows of single tokens of an embedding that has factors too"
            raise CheckpointError(store.name, reason, key=site.parameter, fix="Merge it with PEFT first")
    if not any(site in root.storage or site.role in VOCABULARY for site in (*factors, *whole)):
        raise _nothing_changed(store, root, known, skipped)
    parts: dict[str, tuple[Store, str]] = {name: (root.store, name) for name in root.store.headers}
    parts |= {key[owner]: source for owner, source in saved.items()}
    notes = tuple(note for note in (*known.notes, _other_base(recipe.base, root)) if note)
    # A site that a skipped tensor changes is not known, so it is none of the adapter's.
    root = _without(root, unknown | _named(root, (owner_of(name) for name in store.skipped)))
    config = store.config if "model_type" in store.config else root.config
    change = AdapterChange(root, {key[o]: one for o, one in laid.items()}, whole, factors, skipped)
    return Checkpoint(JoinedStore(store, parts, config=config, notes=notes), change=change)


def _nothing_changed(store: Store, root: Checkpoint, known: Checked, skipped: Skipped) -> Exception:
    """Return the error for an adapter that changes nothing in base."""
    for name, (why, _) in skipped.items():
        reason = f"nothing in it can be read: {why}"
        return CheckpointError(store.name, reason, key=name, fix="Merge it with PEFT first")
    names = list(known.tensors.whole)
    return NothingToCompare(
        f"none of the {len(names)} parameters of {store.name} is one of {root.store.name}; "
        f"first: {quoted(names[0] if names else 'none')}. Is this the right base?"
    )


def _other_base(named: str, root: Checkpoint) -> str:
    """Return a remark if an adapter names another base than the one it is laid over, else ""."""
    known = {root.store.name.partition("@")[0], str(root.config.get("_name_or_path", "")), root.store.source}
    # Only the last parts are compared: the training machine had other folders.
    if not named or PurePath(named).name in {PurePath(name).name for name in known}:
        return ""
    return f"it names {PurePath(named).name!r} as its base, but is read over {root.store.name!r}"


def _factors(store: Store, root: Checkpoint, known: Checked, recipe: Recipe) -> _Factors:
    from affectlens.checkpoints.adapters.bare_parameters import bare_changes
    from affectlens.checkpoints.adapters.low_rank import LowRank

    found, home = known.tensors, root
    factors: dict[Site, LowRank] = {}
    skipped: Skipped = {}
    first: dict[Site, str] = {}
    biases = {f"{w.removesuffix('.weight')}.bias": Pair(b=bias) for w, bias in found.biases.items()}
    ranks = {owner: store.headers[pair.a].shape[0] for owner, pair in found.pairs.items()}
    pairs = {**found.pairs, **biases}
    for owner, (pair, places) in _placed(store, root, pairs).items():
        weight = f"{owner.removesuffix('.bias')}.weight" if owner in biases else owner
        scale = recipe.scales.get(pair.a or pair.b, known.rules[weight].scale(ranks[weight]))
        for site, where in places:
            if site.role == "lm_head" and site not in home.storage and not recipe.ties:
                home = sharing(home, site) or home
            if site not in home.storage or home.shape(site) != where.shape:
                size = sum(_size(store, name) for name in (pair.a, pair.b) if name)
                skipped[owner] = (_SAME if site.role == "lm_head" and recipe.ties else _NOT_IN_BASE, size)
                continue
            # Two names can mean one parameter, with or without a wrapper's prefix: a sum would be a guess.
            if first.setdefault(site, owner) != owner:
                reason = f"names the same parameter as {first[site]!r} ({site})"
                raise CheckpointError(store.name, reason, key=owner)
            factors[site] = LowRank(store, pair, where, scale, ranks[weight])
    if found.pairs and not factors:
        raise NothingToCompare(
            f"none of the {len(found.pairs)} LoRA pairs of {store.name} fits a parameter of "
            f"{root.store.name}; first: {next(iter(found.pairs))!r}. Is this the right base?"
        )
    bare = bare_changes(store, root, nested=found.nested, recipe=recipe)
    skipped |= {name: (why, _size(store, name)) for name, why in bare.skipped.items()}
    return _Factors({**factors, **bare.factors}, skipped, bare.unknown, home)


def _placed(
    store: Store, root: Checkpoint, pairs: Mapping[str, Pair]
) -> dict[str, tuple[Pair, list[tuple[Site, Storage]]]]:
    """Return the sites that each pair changes, with their places in the parameter that it makes."""
    names = canonical([*pairs, *context_of(root)], root.config)
    at = {laid.name: tensor for tensor, laid in root.laid.items()}
    # Parameters that base fuses, stacks or names otherwise are laid out by the shape of B·A.
    elsewhere = {owner: made(store, pair) for owner, pair in pairs.items() if names[owner] not in at}
    placed: dict[str, tuple[Pair, list[tuple[Site, Storage]]]] = {o: (p, []) for o, p in pairs.items()}
    for site, where in sites_of(
        lay_out(elsewhere, root.config, context=context_of(root)), store.name
    ).items():
        placed[where.tensor][1].append((site, where))
    by_tensor: dict[str, list[tuple[Site, Storage]]] = {}
    for site, where in root.storage.items():
        by_tensor.setdefault(where.tensor, []).append((site, where))
    for owner, pair in pairs.items():
        if owner not in elsewhere:
            tensor = at[names[owner]]
            _fits(store, owner, pair, root.laid[tensor].shape, root.laid[tensor].transposed)
            placed[owner][1].extend(by_tensor[tensor])
    return placed


def _rows(
    store: Store, root: Checkpoint, rows: Mapping[str, str], recipe: Recipe
) -> Iterator[tuple[str, tuple[Store, str]]]:
    """Yield each embedding with its rows of single tokens replaced."""
    names = canonical([*rows, *context_of(root)], root.config) if rows else {}
    at = {laid.name: tensor for tensor, laid in root.laid.items()}
    for owner, tensor in rows.items():
        module = bare_name(owner).removesuffix(".weight")
        numbers = token_numbers(recipe.tokens, module)
        base = at.get(names[owner])
        if numbers is None or base is None:
            lacks = (
                "its config lists no tokens (trainable_token_indices)" if numbers is None else _NOT_IN_BASE
            )
            raise CheckpointError(store.name, f"rows of single tokens: {lacks}", key=tensor)
        yield (
            owner,
            (TokenRowsStore((root.store, base), (store, tensor), numbers=numbers, owner=owner), owner),
        )


def _copies(root: Checkpoint, known: Checked, recipe: Recipe) -> dict[str, str]:
    """Return base's own output embedding, which PEFT saves below factors that repeat the input one's."""
    if not (recipe.ties and root.ties):
        return {}
    below = (name for name in known.tensors.whole if ".base_layer." in name)
    return {
        name: "the base's own copy of an adapted weight" for name in below if "lm_head" in name.split(".")
    }


def _without(root: Checkpoint, unknown: frozenset[Site]) -> Checkpoint:
    if not unknown:
        return root
    view = copy.copy(root)
    view.storage = {site: where for site, where in root.storage.items() if site not in unknown}
    view.sites = Sites(view.storage)
    return view


def _named(root: Checkpoint, owners: Iterable[str]) -> frozenset[Site]:
    """Return the sites of base that these names mean."""
    listed = list(owners)
    if not listed:
        return frozenset()
    found = canonical([*listed, *context_of(root)], root.config)
    names = {found[owner] for owner in listed}
    return frozenset(s for s, where in root.storage.items() if root.laid[where.tensor].name in names)


def _fits(store: Store, owner: str, pair: Pair, stored: Shape, transposed: bool) -> None:
    shape = stored[::-1] if transposed else stored
    product = made(store, pair)
    if product != shape:
        raise CheckpointError(store.name, f"its factors make {product}, base has {shape}", key=owner)


def _size(store: Store, name: str) -> int:
    header: Header = store.headers[name]
    return math.prod(header.shape)
