"""An adapter over its base as one checkpoint of effective weights; and an adapter alone, to look at.

Each factor pair is laid out by name as the parameter that it changes, beside those of base. Tensors without
a place in base are never dropped silently: they get a site of their own, or are skipped with the reason.
"""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from affectlens import printable
from affectlens.checkpoints.adapters.factor_names import FACTOR, Checked, Pair, checked, made, owner_of
from affectlens.checkpoints.adapters.recipes import Recipe, ScaleRule, recipe
from affectlens.checkpoints.checkpoint import AdapterChange, Checkpoint, context_of, left_out
from affectlens.checkpoints.store import Header, JoinedStore, Store
from affectlens.errors import CheckpointError, NothingToCompare
from affectlens.sites import Laid, Site, Sites, Storage, canonical, drawn, lay_out, nodes, record, sites_of

if TYPE_CHECKING:
    from affectlens.checkpoints.adapters.low_rank import LowRank

Shape = tuple[int, ...]


def adapted(store: Store, base: Checkpoint, *, recipe: Recipe) -> Checkpoint:
    """Lay the tensors of an adapter over `base`, or over the base of `base` if that is an adapter too.

    Raises `CheckpointError` for factors that don't fit, and `NothingToCompare` if none has a place.
    """
    # An adapter replaces the one on `base`: their changes are not added up.
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
    # Tensors saved whole are laid out like those of any checkpoint.
    shapes = {owner: store.headers[tensor].shape for tensor, owner in found.whole.items()}
    laid = lay_out(shapes, root.config, context=context_of(root))
    tensors = {owner: tensor for tensor, owner in found.whole.items()}
    # With the adapter's name, since base may store a tensor of the same name.
    key = {owner: f"{store.name}:{tensor}" for owner, tensor in tensors.items()}
    whole = {
        site: where._replace(tensor=key[where.tensor]) for site, where in sites_of(laid, store.name).items()
    }
    parts: dict[str, tuple[Store, str]] = {name: (root.store, name) for name in root.store.headers}
    parts |= {key[owner]: (store, tensor) for owner, tensor in tensors.items()}
    notes = tuple(note for note in (*known.notes, _other_base(recipe.base, root)) if note)
    change = AdapterChange(root, {key[owner]: one for owner, one in laid.items()}, whole, factors, skipped)
    return Checkpoint(
        JoinedStore(store, parts, config=store.config or root.config, notes=notes), change=change
    )


class Adapter:
    """An adapter without its base: its tensors, laid out as the parameters that they change.

    Raises `CheckpointError` for an adapter that could not be read over any base.
    """

    def __init__(self, store: Store, config: Mapping[str, Any]) -> None:
        self.name, self.config, self.headers = store.name, config, store.headers
        self.recipe = recipe(self.name, config, preset=None, alpha=None)
        known = checked(store, self.recipe)
        self.notes = (*store.notes, *left_out(store.skipped), *known.notes)
        owners = {tensor: _unnamed(_owner(tensor), self.recipe.bare) for tensor in self.headers}
        shapes = _shapes(owners, self.headers)
        found = lay_out(shapes)
        self.laid: dict[str, Laid] = {tensor: found[owner] for tensor, owner in owners.items()}
        self.sites = Sites(sites_of(found, self.name))

    def lines(self) -> list[tuple[str, str]]:
        """Return rows of (what, value) for people to read."""
        known = self.config
        rank, alpha = known.get("r") or self._ranks(), known.get("lora_alpha")
        targets = known.get("target_modules")
        kinds = {match["kind"] for t in self.headers if (match := FACTOR.search(t))}
        decomposed = self.recipe.dora or "lora_magnitude_vector" in kinds
        extra = sorted({_owner(t) for t in self.headers if not FACTOR.search(t)})
        size = sum(math.prod(header.shape) for header in self.headers.values())
        return [
            ("adapter", self.name),
            ("kind", f"{known.get('peft_type', 'bare trainables')}{', DoRA' if decomposed else ''}"),
            ("base", str(known.get("base_model_name_or_path") or "not named")),
            (
                "rank",
                f"{rank}, alpha {'in no file' if alpha is None else alpha}, scale {_scale(self.recipe)}",
            ),
            *(
                ("patterns", f"{key}: {known[key]}")
                for key in ("rank_pattern", "alpha_pattern")
                if known.get(key)
            ),
            ("targets", targets if isinstance(targets, str) else _listed(targets)),
            *(
                [("parameters", _listed(known["target_parameters"]))]
                if known.get("target_parameters")
                else []
            ),
            ("parameters", f"{size:,} in {len(self.headers)} tensors, on {len(self.sites)} parameters"),
            ("dtype", ", ".join(sorted({header.dtype for header in self.headers.values()}))),
            *(("beside", note) for note in self.notes),
            *([("saved whole", ", ".join(extra[:4]) + (", …" if len(extra) > 4 else ""))] if extra else []),
        ]

    def _ranks(self) -> str:
        found = {
            h.shape[0] for t, h in self.headers.items() if FACTOR.search(t) and "lora_A" in t and h.shape
        }
        return ", ".join(map(str, sorted(found))) or "unknown"

    def records(self) -> list[dict[str, Any]]:
        """Return a record for each tensor, in the schema of `inspect --json`; `lora` names its factor."""
        found = []
        for tensor, header in self.headers.items():
            match = FACTOR.search(tensor)
            row = record(tensor, self.laid[tensor], dtype=header.dtype)
            found.append({**row, "lora": match["kind"] if match else None, "shape": list(header.shape)})
        return found

    def __repr__(self) -> str:
        lines = [f"{name:12} {printable.plain(value)}" for name, value in self.lines()]
        return "\n".join([*lines, "", *drawn(nodes(self.sites))])


def _other_base(named: str, root: Checkpoint) -> str:
    """Return a remark if an adapter names another base than the one it is laid over, else ""."""
    known = {root.store.name.partition("@")[0], str(root.config.get("_name_or_path", "")), root.store.source}
    # Only the last parts are compared: the training machine had other folders.
    if not named or PurePath(named).name in {PurePath(name).name for name in known}:
        return ""
    return f"it names {PurePath(named).name!r} as its base, but is read over {root.store.name!r}"


def _factors(
    store: Store, root: Checkpoint, known: Checked
) -> tuple[dict[Site, "LowRank"], dict[str, tuple[str, int]]]:
    from affectlens.checkpoints.adapters.low_rank import LowRank

    pairs = known.tensors.pairs
    names = canonical([*pairs, *context_of(root)], root.config)
    at = {laid.name: tensor for tensor, laid in root.laid.items()}
    # Parameters that base fuses, stacks or names otherwise are laid out by the shape of B·A.
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
            # Two names can mean one parameter, with or without a wrapper's prefix: a sum would be a guess.
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


def _owner(tensor: str) -> str:
    """Return the parameter that a tensor changes or is; PEFT may save a trained embedding as `base_layer`."""
    found = owner_of(tensor)
    return found if FACTOR.search(tensor) else found.replace(".base_layer.", ".")


def _unnamed(owner: str, parents: frozenset[str]) -> str:
    """Name a bare parameter by its number: PEFT nests their factors in one module and saves no names."""
    module, nested = owner.removesuffix(".weight"), 0
    while module.endswith(".base_layer"):
        module, nested = module.removesuffix(".base_layer"), nested + 1
    if module.rpartition(".")[2] not in parents:
        return owner
    return f"{module}.adapted_parameter_{nested}"


def _listed(names: object) -> str:
    return ", ".join(sorted(map(str, names))) if isinstance(names, list) else "unknown"


def _shapes(owners: Mapping[str, str], headers: Mapping[str, Header]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters, from those of their factors: B is (out, rank), A is (rank, in)."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor, owner in owners.items():
        match, shape = FACTOR.search(tensor), headers[tensor].shape
        out, into = found.get(owner, (0, 0))[:2] if len(found.get(owner, ())) >= 2 else (0, 0)
        if match is None:
            found[owner] = shape
        elif match["kind"].endswith("A") and len(shape) >= 2:
            found[owner] = (out, shape[-1])
        elif match["kind"].endswith("B") and len(shape) >= 2:
            found[owner] = (shape[0], into)
    return {owner: found.get(owner, (0,)) for owner in owners.values()}


def _scale(known: Recipe) -> str:
    found = ScaleRule(known.alpha, known.rank, known.rooted).scale(known.rank) if known.rank else None
    return "unknown" if found is None else f"{found:g}"
