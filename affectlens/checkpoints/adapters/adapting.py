"""An adapter over its base, as one checkpoint of effective weights.

Names propose: each factor pair is laid out as the parameter it changes, beside those of base. What finds no
place in base is never dropped in silence: it is a site of its own, or skipped with the reason.
"""

import math
from pathlib import PurePath
from typing import TYPE_CHECKING

from affectlens.checkpoints.adapters.factors import Pair, Sorted, sort
from affectlens.checkpoints.adapters.recipes import Recipe
from affectlens.checkpoints.checkpoint import Change, Checkpoint, Header, Store, context_of
from affectlens.checkpoints.joined import JoinedStore
from affectlens.errors import CheckpointError, NothingToCompare
from affectlens.sites import Site, Storage, bare_name, canonical, lay_out, sites_of

if TYPE_CHECKING:
    from affectlens.checkpoints.adapters.lowrank import LowRank

Shape = tuple[int, ...]
_MOST = 4096  # of a rank: a matrix of rank × rank numbers is held in memory


def adapted(store: Store, base: Checkpoint, *, recipe: Recipe) -> Checkpoint:
    """Lay the tensors of an adapter over `base`; over its own base where that is an adapter too.

    Raises `CheckpointError` for factors that don't fit, and `NothingToCompare` when none finds its place.
    """
    root = base.change.base if base.change else base
    found = sort(store.headers, store.name, bare=recipe.bare)
    factors, skipped = _factors(store, root, found, recipe)
    if found.pairs and not factors:
        first = next(iter(found.pairs))
        raise NothingToCompare(
            f"none of the {len(found.pairs)} LoRA pairs of {store.name} fits a parameter of "
            f"{root.store.name}; first: {first!r}. Is this the right base?"
        )
    skipped |= {name: (why, _size(store, name)) for name, why in found.rest.items()}
    if skipped and not factors and not found.whole:
        why = next(iter(skipped.values()))[0]
        raise CheckpointError(store.name, f"nothing in it can be read: {why}", fix="Merge it with PEFT first")
    shapes = {owner: store.headers[tensor].shape for tensor, owner in found.whole.items()}
    laid = lay_out(shapes, root.config, context=context_of(root))
    tensors = {owner: tensor for tensor, owner in found.whole.items()}
    key = {owner: f"{store.name}:{tensor}" for owner, tensor in tensors.items()}
    whole = {
        site: where._replace(tensor=key[where.tensor]) for site, where in sites_of(laid, store.name).items()
    }
    parts: dict[str, tuple[Store, str]] = {name: (root.store, name) for name in root.store.headers}
    parts |= {key[owner]: (store, tensor) for owner, tensor in tensors.items()}
    notes = tuple(note for note in (recipe.note, _other_base(recipe.base, root)) if note)
    change = Change(root, {key[owner]: one for owner, one in laid.items()}, whole, factors, skipped)
    return Checkpoint(
        JoinedStore(store, parts, config=store.config or root.config, notes=notes), change=change
    )


def _other_base(named: str, root: Checkpoint) -> str:
    """A remark where an adapter names another base than the one it is laid over."""
    known = {root.store.name.partition("@")[0], str(root.config.get("_name_or_path", "")), root.store.source}
    if not named or PurePath(named).name in {PurePath(name).name for name in known}:
        return ""
    return f"it names {PurePath(named).name!r} as its base, and is read over {root.store.name!r}"


def _factors(
    store: Store, root: Checkpoint, found: Sorted, recipe: Recipe
) -> tuple[dict[Site, "LowRank"], dict[str, tuple[str, int]]]:
    from affectlens.checkpoints.adapters.lowrank import LowRank

    names = canonical([*found.pairs, *context_of(root)], root.config)
    at = {laid.name: tensor for tensor, laid in root.laid.items()}
    elsewhere = {owner: _shape(store, pair) for owner, pair in found.pairs.items() if names[owner] not in at}
    placed: dict[str, list[tuple[Site, Storage]]] = {owner: [] for owner in found.pairs}
    for site, where in sites_of(
        lay_out(elsewhere, root.config, context=context_of(root)), store.name
    ).items():
        placed[where.tensor].append((site, where))
    by_tensor: dict[str, list[tuple[Site, Storage]]] = {}
    for site, where in root.storage.items():
        by_tensor.setdefault(where.tensor, []).append((site, where))
    factors, skipped = {}, {}
    modules = {owner: bare_name(owner).removesuffix(".weight") for owner in found.pairs}
    rules = recipe.of(modules.values(), store.name)
    for owner, pair in found.pairs.items():
        rule = rules[modules[owner]]
        _check(store, owner, pair, dora=recipe.dora, rank=rule.rank)
        scale = rule.scale(store.headers[pair.a].shape[0])
        if owner not in elsewhere:
            tensor = at[names[owner]]
            _fits(store, owner, pair, root.laid[tensor].shape, root.laid[tensor].transposed)
            placed[owner] = by_tensor[tensor]
        for site, where in placed[owner]:
            if site not in root.storage or root.shape(site) != where.shape:
                size = sum(_size(store, name) for name in (pair.a, pair.b))
                skipped[owner] = ("changes a parameter that base does not have", size)
                continue
            factors[site] = LowRank(store, pair, where, scale)
    return factors, skipped


def _check(store: Store, owner: str, pair: Pair, *, dora: bool, rank: float | None) -> None:
    """Raise `CheckpointError` for factors that fit neither each other, nor the rank, nor what DoRA needs."""
    a, b = store.headers[pair.a].shape, store.headers[pair.b].shape
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or not a[0]:
        raise CheckpointError(store.name, f"factors of shapes {b} and {a} make no product", key=owner)
    if a[0] > _MOST:
        reason, fix = f"rank {a[0]:,} is no low one", "Merge it into its base with PEFT first"
        raise CheckpointError(store.name, reason, key=owner, fix=fix)
    if rank is not None and a[0] != rank:
        reason = f"its factors have rank {a[0]}, and {rank:g} is what its config or the preset says"
        raise CheckpointError(store.name, reason, key=owner)
    if dora and not pair.magnitude:
        raise CheckpointError(store.name, "DoRA without its magnitude vector", key=owner)
    if not pair.magnitude:
        return
    made = _shape(store, pair)
    if pair.embedding or len(made) != 2:
        reason, fix = "DoRA of an embedding or a convolution is not supported", "Merge it with PEFT first"
        raise CheckpointError(store.name, reason, key=owner, fix=fix)
    lengths = store.headers[pair.magnitude].shape
    if math.prod(lengths) != made[0]:
        reason = f"DoRA with magnitudes of shape {lengths} for {made[0]} rows"
        raise CheckpointError(store.name, reason, key=owner)


def _shape(store: Store, pair: Pair) -> Shape:
    """The shape (out, in) of the parameter that a pair changes."""
    a, b = store.headers[pair.a].shape, store.headers[pair.b].shape
    return (a[-1], b[0]) if pair.embedding else (b[0], *a[1:])


def _fits(store: Store, owner: str, pair: Pair, stored: Shape, transposed: bool) -> None:
    shape = stored[::-1] if transposed else stored
    made = _shape(store, pair)
    if made != shape:
        raise CheckpointError(store.name, f"its factors make {made}, base has {shape}", key=owner)


def _size(store: Store, name: str) -> int:
    header: Header = store.headers[name]
    return math.prod(header.shape)
