"""Export an adapter or a file of trainables as a folder that PEFT loads, or merge it into a whole model.

    .pth of trainables ┐                ┌─▶ adapter_model.safetensors + adapter_config.json   export
    a PEFT adapter     ┴─ over a base ──┴─▶ the base with the adapter's sites put in          merge

A file of trainables states neither alpha nor, in a form that PEFT reads, its modules. The export states both,
each module by its whole name.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint, pair
from affectlens.checkpoints.adapters.factor_names import Pair
from affectlens.checkpoints.adapters.low_rank import LowRank
from affectlens.checkpoints.folders import ADAPTER
from affectlens.checkpoints.store import JoinedStore
from affectlens.errors import CheckpointError
from affectlens.interventions.transplant import Transplant
from affectlens.sites import Site, Sites
from affectlens.table import versions
from affectlens.writing.folder import filled
from affectlens.writing.provenance import write_record
from affectlens.writing.saving import changed, write
from affectlens.writing.shards import write_new

FORMAT = "affectlens.exported/1"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def export(
    source: str | Path,
    base: Source,
    *,
    out: str | Path,
    preset: str | None = None,
    alpha: float | None = None,
) -> Mapping[str, Any]:
    """Write an adapter as a new PEFT folder and return its record; `left_out` lists what PEFT can't load.

    `preset` and `alpha` are those of `open_checkpoint`. Raises `CheckpointError` if there are no factors or
    alpha is unknown, and `WriteError` as `write` does.
    """
    before = open_checkpoint(base)
    adapter = open_checkpoint(source, base=before, preset=preset, alpha=alpha)
    parts = adapter_parts(adapter, before)
    named = str(base) if isinstance(base, str | Path) else before.store.source
    found = {
        "format": FORMAT,
        "base": before.identity,
        "source": adapter.identity,
        "adapter": {
            "modules": len(parts.ranks),
            "parameters": sum(prod(header.shape) for header in parts.weights.headers.values()),
            "saved_whole": len(parts.saved),
        },
        "left_out": dict(parts.left_out),
        "versions": dict(versions()),
    }
    with filled(out) as room:
        write_new(parts.weights, room, single=_WEIGHTS)
        text = json.dumps(parts.config(base=named), indent=2, allow_nan=False)
        (room / ADAPTER).write_text(text, "utf-8")
        write_record(found, room)
        for side in (before, adapter):
            side.store.check()
    return found


def merge(
    source: str | Path,
    base: Source,
    *,
    out: str | Path,
    preset: str | None = None,
    alpha: float | None = None,
    link: bool = False,
) -> Checkpoint:
    """Write the base with all that an adapter or a file of trainables changes in it, as `write` does."""
    before = open_checkpoint(base)
    donor = open_checkpoint(source, base=before, preset=preset, alpha=alpha)
    if donor.change is not None:
        sites = changed(donor)
    else:
        donor = pair(before, donor).tuned
        sites = before.sites & donor.sites
    return write(before, Transplant(sites, donor=donor), out, link=link)


@dataclass(frozen=True)
class Parts:
    """The part of an adapter that PEFT can load: weights by new names, each module's rank and alpha."""

    weights: JoinedStore
    targets: str
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    saved: tuple[str, ...]  # modules
    left_out: Mapping[str, str]  # name → why
    settings: Mapping[str, Any]

    def config(self, *, base: str) -> dict[str, Any]:
        """Return the adapter_config.json: the commonest rank and alpha, and patterns for other modules."""
        rank, alpha = _most(self.ranks), _most(self.alphas)
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": _number(alpha),
            "rank_pattern": {_exactly(m): r for m, r in self.ranks.items() if r != rank},
            "alpha_pattern": {_exactly(m): _number(a) for m, a in self.alphas.items() if a != alpha},
            "target_modules": self.targets,
            "modules_to_save": list(self.saved) or None,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            **self.settings,
        }


def adapter_parts(adapter: Checkpoint, base: Checkpoint) -> Parts:
    """Sort an adapter into what PEFT can load over the live model of `base`, and what it can't.

    Raises `CheckpointError` if there are no factors, if alpha is unknown, and if only some modules are
    DoRA's, since PEFT's config has one setting for all.
    """
    if adapter.change is None or not adapter.factors:
        raise CheckpointError(
            adapter.store.name, "holds no LoRA factors", fix="Write the whole model: --merged"
        )
    left_out = {name: why for name, (why, _) in adapter.change.skipped.items()}
    modules = dict(_modules(adapter, left_out))
    if not modules:
        raise CheckpointError(
            adapter.store.name,
            "its factors fit no module of the live model",
            fix="Write the whole model: --merged",
        )
    store = next(iter(modules.values())).store
    decomposed = {low.decomposed for low in modules.values()}
    if len(decomposed) > 1:
        fix = "Write the whole model: --merged"
        raise CheckpointError(
            store.name, "only some of its modules are DoRA's, and PEFT has one setting for all", fix=fix
        )
    ranks = {module: store.headers[low.pair.a].shape[0] for module, low in modules.items()}
    tensors = {name: (store, t) for m, low in modules.items() for name, t in _named(m, low.pair)}
    saved = dict(_saved(adapter, base, modules, left_out))
    tensors |= {f"{_PREFIX}{parameter}": (store, tensor) for parameter, tensor in saved.items()}
    # PEFT's name for matrices that are stored transposed, as those of GPT-2 are.
    turned = any(low.where.transposed for low in modules.values())
    settings = {"use_dora": decomposed == {True}, "use_rslora": False, "fan_in_fan_out": turned}
    return Parts(
        JoinedStore(store, tensors, config={}),
        Sites(
            (site for site in adapter.factors if _module(site) in modules), within=base.sites
        ).to_target_modules(),
        ranks,
        {module: _scale(low) * ranks[module] for module, low in modules.items()},
        tuple(sorted({parameter.rpartition(".")[0] for parameter in saved})),
        left_out,
        {**settings, "task_type": _task(base)},
    )


def _modules(adapter: Checkpoint, left_out: dict[str, str]) -> Iterator[tuple[str, LowRank]]:
    """Yield each pair of factors with its live module; put those without one into `left_out`."""
    found: dict[str, dict[str, LowRank]] = {}
    for site, low in adapter.factors.items():
        if low.pair.a:
            found.setdefault(low.pair.a, {})[site.parameter] = low
        else:
            left_out[low.pair.b] = "a bias of the low-rank path (lora_bias)"
    claims = Counter(parameter for parameters in found.values() for parameter in parameters)
    for tensor, parameters in found.items():
        (parameter, low), *others = parameters.items()
        if others or claims[parameter] > 1:
            left_out[tensor] = "the live model fuses other parameters than the adapter"
        elif not parameter.endswith(".weight"):
            left_out[tensor] = f"{parameter} is a bare parameter of the live model, not a module"
        else:
            yield parameter.removesuffix(".weight"), low


def _named(module: str, pair: Pair) -> Iterator[tuple[str, str]]:
    """Yield the tensors of a pair under PEFT's names."""
    for letter, tensor in (("A", pair.a), ("B", pair.b)):
        kind = f"lora_embedding_{letter}" if pair.embedding else f"lora_{letter}.weight"
        yield f"{_PREFIX}{module}.{kind}", tensor
    if pair.magnitude:
        yield f"{_PREFIX}{module}.lora_magnitude_vector", pair.magnitude


def _saved(
    adapter: Checkpoint, base: Checkpoint, modules: Mapping[str, LowRank], left_out: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield the live parameters saved whole, each with its tensor; put the others into `left_out`."""
    assert adapter.change is not None
    first = next(iter(modules.values()))
    sites: dict[str, list[Site]] = {}
    for site, where in adapter.change.whole.items():
        sites.setdefault(where.tensor.removeprefix(f"{first.store.name}:"), []).append(site)
    names = {name.rpartition(".")[0] for name in (site.parameter for site in base.sites)}
    for tensor, here in sites.items():
        why = _unsaved(tensor, here, adapter, base) or _ambiguous(here[0], names, modules)
        if why:
            left_out[tensor] = why
        else:
            yield here[0].parameter, tensor


def _unsaved(tensor: str, sites: list[Site], adapter: Checkpoint, base: Checkpoint) -> str:
    """Return why PEFT can't put a whole tensor into the live model; nothing if it can."""
    if ".trainable_tokens_" in tensor:
        return "rows of single tokens (trainable_token_indices)"
    if ".base_layer." in tensor:
        return "the base's own copy of an adapted weight"
    if any(site not in base.storage for site in sites):
        return "the base has no such parameter"
    if any(adapter.shape(site) != base.shape(site) for site in sites):
        return "its shape in the base differs"
    if base.tied and any(site.role in ("embed_tokens", "lm_head") for site in sites):
        return "input and output embedding are tied, and PEFT would train only one of them"
    if not sites[0].parameter.endswith((".weight", ".bias")):
        return f"{sites[0].parameter} is a bare parameter of the live model, not a module"
    return ""


def _ambiguous(site: Site, names: set[str], modules: Mapping[str, LowRank]) -> str:
    module = _module(site)
    if module in modules:
        return "its module has factors too, and PEFT either saves a module whole or adapts it"
    # PEFT takes every module whose name ends like this one.
    others = sorted(name for name in names if name.endswith(module) and name != module)
    return f"PEFT would also save {others[0]}, whose name ends alike" if others else ""


def _module(site: Site) -> str:
    return site.parameter.rpartition(".")[0]


def _scale(low: LowRank) -> float:
    if low.scale is None:
        reason, fix = "no file says alpha, so the weights are not known", "Give --alpha or --preset"
        raise CheckpointError(low.store.name, reason, fix=fix)
    return low.scale


def _task(base: Checkpoint) -> str | None:
    known = base.config.get("architectures")
    first = known[0] if isinstance(known, list) and known else ""
    return "CAUSAL_LM" if isinstance(first, str) and first.endswith("ForCausalLM") else None


def _most(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _exactly(module: str) -> str:
    """Return a pattern for this module alone; PEFT would match a bare name as an ending."""
    return f"^{re.escape(module)}"


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
