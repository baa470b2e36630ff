"""What can be said of an adapter without its base: whether its factors fit each other, and its config.

looking at it alone ──┐
                      ├─▶ checked ──▶ Checked
adapting its base ────┘
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from affectlens.checkpoints.adapters.factors import Pair, Sorted, sort
from affectlens.checkpoints.adapters.recipes import Recipe, Rule
from affectlens.checkpoints.checkpoint import Store
from affectlens.errors import CheckpointError, quoted
from affectlens.sites import bare_name

_MOST = 4096  # of a rank: a matrix of rank × rank numbers is held in memory
# Whole numbers, and floats of a byte, mean nothing without a scale that no adapter has.
_FLOATING = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Checked:
    """An adapter whose factors fit each other."""

    tensors: Sorted
    rules: Mapping[str, Rule]  # by the parameter that a pair changes
    notes: tuple[str, ...]  # what a reader should hear


def checked(store: Store, recipe: Recipe) -> Checked:
    """Check the factors of an adapter; raises `CheckpointError` for those that make no change of weights."""
    found = sort(store.headers, store.name, bare=recipe.bare)
    modules = {owner: bare_name(owner).removesuffix(".weight") for owner in found.pairs}
    of = recipe.of(modules.values(), store.name)
    rules = {owner: of[module] for owner, module in modules.items()}
    for owner, pair in found.pairs.items():
        _floating(store, pair)
        _product(store, owner, pair, rank=rules[owner].rank)
        _decomposed(store, owner, pair, dora=bool(recipe.dora))
    decomposed = any(pair.magnitude for pair in found.pairs.values())
    return Checked(found, rules, tuple(_notes(recipe, modules.values(), decomposed=decomposed)))


def made(store: Store, pair: Pair) -> tuple[int, ...]:
    """The shape (out, in) of the parameter that a pair changes."""
    a, b = store.headers[pair.a].shape, store.headers[pair.b].shape
    return (a[-1], b[0]) if pair.embedding else (b[0], *a[1:])


def _floating(store: Store, pair: Pair) -> None:
    for name in (pair.a, pair.b, pair.magnitude):
        if name and store.headers[name].dtype not in _FLOATING:
            reason = f"a factor of {store.headers[name].dtype}, which has no scale"
            fix = "Save it in float32, float16 or bfloat16"
            raise CheckpointError(store.name, reason, key=name, fix=fix)


def _product(store: Store, owner: str, pair: Pair, *, rank: float | None) -> None:
    a, b = store.headers[pair.a].shape, store.headers[pair.b].shape
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or not a[0]:
        raise CheckpointError(store.name, f"factors of shapes {b} and {a} make no product", key=owner)
    if a[0] > _MOST:
        reason, fix = f"rank {a[0]:,} is no low one", "Merge it into its base with PEFT first"
        raise CheckpointError(store.name, reason, key=owner, fix=fix)
    if rank is not None and a[0] != rank:
        reason = f"its factors have rank {a[0]}, and {rank:g} is what its config or the preset says"
        raise CheckpointError(store.name, reason, key=owner)


def _decomposed(store: Store, owner: str, pair: Pair, *, dora: bool) -> None:
    if dora and not pair.magnitude:
        raise CheckpointError(store.name, "DoRA without its magnitude vector", key=owner)
    if not pair.magnitude:
        return
    shape = made(store, pair)
    if pair.embedding or len(shape) != 2:
        reason, fix = "DoRA of an embedding or a convolution is not supported", "Merge it with PEFT first"
        raise CheckpointError(store.name, reason, key=owner, fix=fix)
    lengths = store.headers[pair.magnitude].shape
    if math.prod(lengths) != shape[0]:
        reason = f"DoRA with magnitudes of shape {lengths} for {shape[0]} rows"
        raise CheckpointError(store.name, reason, key=owner)


def _notes(recipe: Recipe, modules: Collection[str], *, decomposed: bool) -> Iterator[str]:
    """What is no error, and may well be a mistake: PEFT loads only what its config names, in silence."""
    yield from recipe.notes
    negative = [alpha for alpha in (recipe.alpha, *recipe.alphas.values()) if alpha is not None and alpha < 0]
    if negative:
        yield f"alpha is {negative[0]:g}, a negative one: B·A is subtracted from the weights"
    if decomposed and recipe.dora is False:
        yield "it has DoRA's magnitudes, and its config says no use_dora: PEFT would not load them"
    for what, named in (("target_modules", recipe.targets), ("layers_to_transform", recipe.layers)):
        rest = [module for module in modules if named and named.isdisjoint(module.split("."))]
        if rest:
            reason = f"with factors are outside its {what}, and PEFT would not load these"
            yield f"{len(rest)} modules {reason} (first: {quoted(rest[0])})"
