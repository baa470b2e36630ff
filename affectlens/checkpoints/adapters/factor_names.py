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
_TOKENS = re.compile(r"\.token_adapter\.trainable_tokens_(?P<kind>\w+)(?:\.(?P<adapter>[^.]+))?$")
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.[^.]+$))?(?=\.)")
_MOST = 4096  # highest rank: a matrix of rank × rank numbers is kept in memory
# Integers and 8-bit floats need a scale, which adapters don't store.
_FLOATING = ("float64", "float32", "float16", "bfloat16")


@dataclass
class Pair:
    """The tensors that change one parameter by scale · B·A; a bias has no A, and changes by scale · B."""

    a: str = ""
    b: str = ""
    magnitude: str = ""
    embedding: bool = False


@dataclass
class Sorted:
    """The tensors of an adapter, by kind."""

    pairs: dict[str, Pair] = field(default_factory=dict)  # parameter → its factors
    biases: dict[str, str] = field(
        default_factory=dict
    )  # weight with factors → the bias of its B (lora_bias)
    # module → its bare parameters, the outermost wrapper first (target_parameters)
    nested: dict[str, list[Pair]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)  # embedding → its rows of single tokens
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

    `bare` are modules, such as experts, whose own parameters are adapted: PEFT nests one wrapper for each of
    them, and does not save their names.
    """
    found, adapters = Sorted(), set()
    nested: dict[str, dict[int, Pair]] = {}
    for name in sorted(names):
        match = FACTOR.search(name)
        if match is None:
            _other(found, name, source)
            continue
        adapters.add(match["adapter"])
        module = name[: match.start()]
        if match["param"] == "bias" and match["kind"] == "lora_B":
            found.biases[f"{module}.weight"] = name
            continue
        inner = _NESTED.sub("", module)
        if inner.rpartition(".")[2] in bare:
            pair = nested.setdefault(inner, {}).setdefault(module.count(".base_layer"), Pair())
        else:
            pair = found.pairs.setdefault(f"{module}.weight", Pair())
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
    found.nested = {module: [by[depth] for depth in sorted(by)] for module, by in nested.items()}
    _refuse_single(found, source)
    return found


def _other(found: Sorted, name: str, source: str) -> None:
    """Sort a tensor that is no factor."""
    tokens = _TOKENS.search(name)
    if tokens is not None and tokens["kind"] == "delta":
        found.rows[f"{name[: tokens.start()]}.weight"] = name
    elif tokens is not None:
        found.rest[name] = "the base's own rows of single tokens"
    elif _UNKNOWN.search(name):
        fix = "Merge it into its base with PEFT first"
        raise CheckpointError(source, "a tensor of an unknown variant of LoRA", key=name, fix=fix)
    elif _ORIGINAL.search(name):
        found.rest[name] = "the base's own copy of a module that was trained whole"
    else:
        found.whole[name] = owner_of(name)


def _refuse_single(found: Sorted, source: str) -> None:
    """Raise `CheckpointError` for a factor without its partner."""
    every = {**found.pairs, **{f"{m} ({n})": p for m, ps in found.nested.items() for n, p in enumerate(ps)}}
    for owner, pair in every.items():
        if not pair.a or not pair.b:
            there, lacks = ("lora_A", "lora_B") if pair.a else ("lora_B", "lora_A")
            there = there if pair.a or pair.b else "lora_magnitude_vector"
            raise CheckpointError(source, f"{there} without {lacks}", key=owner)
    for owner, bias in found.biases.items():
        if owner not in found.pairs:
            raise CheckpointError(source, "a bias of lora_B without its factors", key=bias)


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
    for pair in (
        *(pair for each in found.nested.values() for pair in each),
        *map(_bias_alone, found.biases.values()),
    ):
        _floating(store, pair)
    for owner, pair in found.pairs.items():
        _floating(store, pair)
        _product(store, owner, pair, rank=rules[owner].rank)
        _decomposed(store, owner, pair, dora=bool(recipe.dora))
    decomposed = any(pair.magnitude for pair in found.pairs.values())
    return Checked(found, rules, tuple(_notes(recipe, modules.values(), decomposed=decomposed)))


def _bias_alone(tensor: str) -> Pair:
    return Pair(b=tensor)


def made(store: Store, pair: Pair) -> tuple[int, ...]:
    """Return the shape (out, in) of the parameter that a pair changes."""
    if not pair.a:
        return store.headers[pair.b].shape
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
        rest = [module for module in rest if not (recipe.ties and module.endswith("lm_head"))]
        if rest:
            reason = f"with factors are outside its {what}, so PEFT would not load them"
            yield f"{len(rest)} modules {reason} (first: {quoted(rest[0])})"
