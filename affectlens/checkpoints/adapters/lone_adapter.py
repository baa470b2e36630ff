"""An adapter without its base, to look at: its tensors, laid out as the parameters that they change."""

import math
from collections.abc import Mapping
from typing import Any

from affectlens import printable
from affectlens.checkpoints.adapters.factor_names import FACTOR, checked, owner_of
from affectlens.checkpoints.adapters.recipes import Recipe, ScaleRule, recipe
from affectlens.checkpoints.checkpoint import left_out
from affectlens.checkpoints.store import Header, Store
from affectlens.sites import Laid, Sites, drawn, lay_out, nodes, record, sites_of


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
