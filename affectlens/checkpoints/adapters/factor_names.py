"""The tensors of an adapter, sorted by name and checked: factors of a change, or whole parameters.

PEFT names a factor `….lora_A.weight`, with the adapter's name before `weight` if the live model was saved.
Modules that were trained whole are under `modules_to_save`, beside the copies that they replaced.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from affectlens.checkpoints.adapters.recipes import Recipe, ScaleRule
from affectlens.checkpoints.store import Store
from affectlens.errors import CheckpointError, quoted
from affectlens.sites import bare_name

FACTOR = re.compile(
    r"\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<param>weight|bias))?$"
)
_ORIGINAL = re.compile(r"\.original_module(?=\.)")
_UNKNOWN = re.compile(r"\.lora_\w+(?:\.|$)")
_NESTED = re.compile(r"(?:\.base_layer)+$")
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.[^.]+$))?(?=\.)")
_MOST = 4096  # highest rank: a matrix of rank × rank numbers is kept in memory
# Integers and 8-bit floats need a scale, which adapters don't store.
_FLOATING = ("float64", "float32", "float16", "bfloat16")


@dataclass
class Pair:
    """The tensors that change one parameter by scale · B·A."""

    a: str = ""
    b: str = ""
    magnitude: str = ""
    embedding: bool = False


@dataclass
class Sorted:
    """The tensors of an adapter, by kind."""

    pairs: dict[str, Pair] = field(default_factory=dict)  # parameter → its factors
    whole: dict[str, str] = field(default_factory=dict)  # tensor → the parameter it is
    rest: dict[str, str] = field(default_factory=dict)  # tensor → why it is left out


def owner_of(tensor: str) -> str:
    """Return the parameter that a tensor of an adapter changes or is."""
    match = FACTOR.search(tensor)
    if match is None:
        return _SAVED.sub("", _ORIGINAL.sub("", tensor))
    return f"{tensor[: match.start()]}.{match['param'] or 'weight'}"


def sort(names: Iterable[str], source: str, *, bare: frozenset[str] = frozenset()) -> Sorted:
    """Sort the tensors of an adapter; raises `CheckpointError` for a repeated or unpaired factor.

    `bare` are modules, such as experts, whose own parameters are adapted. PEFT does not save the names of
    these parameters, so their factors are left out.
    """
    found, adapters = Sorted(), set()
    for name in sorted(names):
        match = FACTOR.search(name)
        if match is None:
            if "token_adapter.trainable_tokens" in name:
                found.rest[name] = "rows of single tokens (trainable_token_indices), which are not compared"
            elif _UNKNOWN.search(name):
                fix = "Merge it into its base with PEFT first"
                raise CheckpointError(source, "a tensor of an unknown variant of LoRA", key=name, fix=fix)
            elif _ORIGINAL.search(name):
                found.rest[name] = "the base's own copy of a module that was trained whole"
            else:
                found.whole[name] = owner_of(name)
            continue
        if _NESTED.sub("", name[: match.start()]).rpartition(".")[2] in bare:
            found.rest[name] = "factors of a bare parameter (target_parameters), which PEFT does not name"
            continue
        if match["param"] == "bias":
            found.rest[name] = "a bias of the low-rank path (lora_bias), which is not compared"
            continue
        adapters.add(match["adapter"])
        pair = found.pairs.setdefault(f"{name[: match.start()]}.weight", Pair())
        kind = match["kind"]
        pair.embedding = pair.embedding or kind.startswith("lora_embedding")
        slot = "magnitude" if kind.endswith("vector") else kind[-1].lower()
        taken = getattr(pair, slot)
        if taken and len(adapters) == 1:
            raise CheckpointError(source, f"names the same factor as {quoted(taken)}", key=name)
        setattr(pair, slot, name)
    if len(adapters) > 1:
        names_ = ", ".join(sorted(str(a) for a in adapters))
        raise CheckpointError(
            source, f"holds several adapters ({names_})", fix="Save the one to compare by itself"
        )
    for owner, pair in found.pairs.items():
        if not pair.a or not pair.b:
            there, lacks = ("lora_A", "lora_B") if pair.a else ("lora_B", "lora_A")
            there = there if pair.a or pair.b else "lora_magnitude_vector"
            raise CheckpointError(source, f"{there} without {lacks}", key=owner)
    return found


@dataclass(frozen=True)
class Checked:
    """The sorted tensors of an adapter whose factors fit each other, with their scale rules."""

    tensors: Sorted
    rules: Mapping[str, ScaleRule]  # parameter → its rule
    notes: tuple[str, ...]  # for the user


def checked(store: Store, recipe: Recipe) -> Checked:
    """Sort and check the factors of an adapter; raises `CheckpointError` if they don't fit each other."""
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
    """Return the shape (out, in) of the parameter that a pair changes."""
    a, b = store.headers[pair.a].shape, store.headers[pair.b].shape
    return (a[-1], b[0]) if pair.embedding else (b[0], *a[1:])


def _floating(store: Store, pair: Pair) -> None:
    for name in (pair.a, pair.b, pair.magnitude):
        if name and store.headers[name].dtype not in _FLOATING:
            reason = f"a factor of {store.headers[name].dtype}, which would need a scale"
            fix = "Save it in float32, float16 or bfloat16"
            raise CheckpointError(store.name, reason, key=name, fix=fix)


def _product(store: Store, owner: str, pair: Pair, *, rank: float | None) -> None:
    a, b = store.headers[pair.a].shape, store.headers[pair.b].shape
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or not a[0]:
        raise CheckpointError(store.name, f"factors of shapes {b} and {a} can't be multiplied", key=owner)
    if a[0] > _MOST:
        reason, fix = (
            f"rank {a[0]:,} is too high (at most {_MOST:,})",
            "Merge it into its base with PEFT first",
        )
        raise CheckpointError(store.name, reason, key=owner, fix=fix)
    if rank is not None and a[0] != rank:
        reason = f"its factors have rank {a[0]}, but its config or the preset says {rank:g}"
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
    """Yield remarks on likely mistakes: PEFT silently loads only the tensors that its config names."""
    yield from recipe.notes
    negative = [alpha for alpha in (recipe.alpha, *recipe.alphas.values()) if alpha is not None and alpha < 0]
    if negative:
        yield f"alpha is negative ({negative[0]:g}): B·A is subtracted from the weights"
    if decomposed and recipe.dora is False:
        yield "it has DoRA magnitudes, but its config does not set use_dora: PEFT would not load them"
    for what, named in (("target_modules", recipe.targets), ("layers_to_transform", recipe.layers)):
        rest = [module for module in modules if named and named.isdisjoint(module.split("."))]
        if rest:
            reason = f"with factors are outside its {what}, so PEFT would not load them"
            yield f"{len(rest)} modules {reason} (first: {quoted(rest[0])})"
