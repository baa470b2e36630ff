"""An adapter over its base, as one checkpoint of effective weights.

Names propose: each factor pair is laid out as the parameter it changes, beside those of base. What finds no
place in base is never dropped in silence: it is a site of its own, or skipped with the reason.
"""

import math
from pathlib import PurePath
from typing import TYPE_CHECKING

from affectlens.checkpoints.adapters.checking import Checked, checked, made
from affectlens.checkpoints.adapters.factors import Pair
from affectlens.checkpoints.adapters.recipes import Recipe
from affectlens.checkpoints.checkpoint import Change, Checkpoint, Header, Store, context_of
from affectlens.checkpoints.joined import JoinedStore
from affectlens.errors import CheckpointError, NothingToCompare
from affectlens.sites import Site, Storage, canonical, lay_out, sites_of

if TYPE_CHECKING:
    from affectlens.checkpoints.adapters.lowrank import LowRank

Shape = tuple[int, ...]


def adapted(store: Store, base: Checkpoint, *, recipe: Recipe) -> Checkpoint:
    """Lay the tensors of an adapter over `base`; over its own base where that is an adapter too.

    Raises `CheckpointError` for factors that don't fit, and `NothingToCompare` when none finds its place.
    """
    root = base.change.base if base.change else base
    known = checked(store, recipe)
    found = known.tensors
    factors, skipped = _factors(store, root, known)
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
    notes = tuple(note for note in (*known.notes, _other_base(recipe.base, root)) if note)
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
    store: Store, root: Checkpoint, known: Checked
) -> tuple[dict[Site, "LowRank"], dict[str, tuple[str, int]]]:
    from affectlens.checkpoints.adapters.lowrank import LowRank

    pairs = known.tensors.pairs
    names = canonical([*pairs, *context_of(root)], root.config)
    at = {laid.name: tensor for tensor, laid in root.laid.items()}
    elsewhere = {owner: made(store, pair) for owner, pair in pairs.items() if names[owner] not in at}
    placed: dict[str, list[tuple[Site, Storage]]] = {owner: [] for owner in pairs}
    for site, where in sites_of(
        lay_out(elsewhere, root.config, context=context_of(root)), store.name
    ).items():
        placed[where.tensor].append((site, where))
    by_tensor: dict[str, list[tuple[Site, Storage]]] = {}
    for site, where in root.storage.items():
        by_tensor.setdefault(where.tensor, []).append((site, where))
    factors: dict[Site, LowRank] = {}
    skipped: dict[str, tuple[str, int]] = {}
    first: dict[Site, str] = {}
    for owner, pair in pairs.items():
        scale = known.rules[owner].scale(store.headers[pair.a].shape[0])
        if owner not in elsewhere:
            tensor = at[names[owner]]
            _fits(store, owner, pair, root.laid[tensor].shape, root.laid[tensor].transposed)
            placed[owner] = by_tensor[tensor]
        for site, where in placed[owner]:
            if site not in root.storage or root.shape(site) != where.shape:
                size = sum(_size(store, name) for name in (pair.a, pair.b))
                skipped[owner] = ("changes a parameter that base does not have", size)
                continue
            if first.setdefault(site, owner) != owner:
                reason = f"names the same parameter as {first[site]!r} ({site})"
                raise CheckpointError(store.name, reason, key=owner)
            factors[site] = LowRank(store, pair, where, scale)
    return factors, skipped


def _fits(store: Store, owner: str, pair: Pair, stored: Shape, transposed: bool) -> None:
    shape = stored[::-1] if transposed else stored
    product = made(store, pair)
    if product != shape:
        raise CheckpointError(store.name, f"its factors make {product}, base has {shape}", key=owner)


def _size(store: Store, name: str) -> int:
    header: Header = store.headers[name]
    return math.prod(header.shape)
