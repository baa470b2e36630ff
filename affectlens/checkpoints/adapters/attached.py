"""The adapters of a live model, as they are now: which are active, at what scale, merged or switched off.

    module ── named layers of PEFT ──▶ tensors that count now, scales ──▶ Checkpoint of effective weights
                                  └──▶ tensors whose effective values are unknown, with the reason

Any state of the model opens. Where the effective values of a site are unknown, reading it raises the reason.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from affectlens.checkpoints.adapters.adapter import adapted
from affectlens.checkpoints.adapters.recipes import Recipe
from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.memory import MemoryStore, value_of
from affectlens.errors import AffectlensError
from affectlens.sites import bare_name

_BELOW = ("base_layer", "original_module", "token_adapter")  # what a layer of PEFT wraps
_PLAIN = ("peft.tuners.lora.", "peft.utils.other", "peft.tuners.trainable_tokens.")
Elsewhere = dict[str, Callable[[], Tensor]]


def adapter_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that PEFT put into a model, by name."""
    for name, part in module.named_modules():
        if is_adapter_layer(part):
            yield name, part


def is_adapter_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer of PEFT, whose adapters can be switched."""
    # A model of transformers has a method of that name.
    return isinstance(getattr(type(module), "disable_adapters", None), property)


def adapter_state(layer: nn.Module) -> tuple[object, ...]:
    """Return what decides which adapters of a layer count, in values that can be compared."""
    known = vars(layer)
    names, scales = known.get("_active_adapter", "default"), known.get("scaling")
    return (
        known.get("_disable_adapters", False),
        names if isinstance(names, str) else tuple(names or ()),
        tuple(known.get("merged_adapters", ())),
        tuple(scales.items()) if isinstance(scales, Mapping) else (),
    )


@dataclass
class _Now:
    """The tensors of adapters that count now; a factor goes by its name without the adapter's."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    elsewhere: Elsewhere = field(default_factory=dict)  # factors of several adapters, side by side
    scales: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)  # adapted by themselves, such as stacked experts
    unclear: dict[str, str] = field(default_factory=dict)  # layer → why its effective weights are unknown


def opened(store: MemoryStore, layers: Mapping[str, Any]) -> Checkpoint:
    """Open the store of a live model with layers of PEFT: as the weights with which it computes now."""
    now = _Now()
    own = dict(store.tensors)
    for name, layer in layers.items():
        mine = {key: own.pop(key) for key in list(own) if _belongs(key, name)}
        why = _unclear(layer)
        if why:
            now.unclear[name] = f"{name}: {why}"
        else:
            _take(now, name, layer, mine, untouched=store.untouched)
    below = store.of(own)
    # In the order of names, so that of nested layers the inner one counts.
    below.merged = {
        tensor: (layer, tuple(vars(layer).get("merged_adapters", ())))
        for name, layer in sorted(layers.items())
        for tensor in own
        if tensor.startswith(f"{name}.")
    }
    base = Checkpoint(below)
    below.unclear = {**store.unclear, **_refused(below, now.unclear)}
    if not now.tensors:
        return base
    parameters = tuple(now.parameters)
    rule = Recipe(scales=now.scales, tokens=now.tokens or None, parameters=parameters)
    try:
        return adapted(store.of(now.tensors, now.elsewhere), base, recipe=rule)
    except AffectlensError as error:  # sites never refuse: the error is raised when one of these is read
        others = {name: str(error) for name in layers} | now.unclear
        below.unclear = {**store.unclear, **_refused(below, others)}
        return base


def _belongs(tensor: str, layer: str) -> bool:
    """Return whether a tensor is one of a layer's adapters, not of what the layer wraps."""
    rest = tensor.removeprefix(f"{layer}.") if layer else tensor
    return (rest != tensor or not layer) and rest.partition(".")[0] not in _BELOW


def _refused(store: MemoryStore, unclear: Mapping[str, str]) -> dict[str, str]:
    """Return the tensors below some layers, each with the reason why its effective values are unknown."""
    return {
        tensor: why
        for layer, why in unclear.items()
        for tensor in store.headers
        if tensor.startswith(f"{layer}.")
    }


def _active(layer: Any) -> list[str]:
    """Return the adapters that a layer has and that count now."""
    if layer.disable_adapters or getattr(layer, "merged_adapters", ()):
        return []
    known = getattr(layer, "_adapters", None)  # of a wrapper around a whole module
    known = layer._get_available_adapters() if known is None else known
    return [name for name in layer.active_adapters if name in known]


def _unclear(layer: Any) -> str:
    """Return why the effective weights of a layer are unknown; "" where they are known."""
    if layer.disable_adapters and getattr(layer, "merged_adapters", ()):
        return (
            "its adapter is merged into the weights and disabled, and the next forward pass takes it out. "
            "Call unmerge_adapter() first"
        )
    active = _active(layer)
    if not active:
        return ""
    kind, named = type(layer).__module__, ", ".join(active)
    if not kind.startswith(_PLAIN):
        return (
            f"adapter {named} is of kind {kind.split('.')[-2]}, not LoRA, so the effective weights are "
            f"unknown. Merge it or disable it"
        )
    decomposed = [name for name in active if getattr(layer, "use_dora", {}).get(name)]
    variants = [name for name in active if name in getattr(layer, "lora_variant", {})]
    if other := sorted(set(variants) - set(decomposed)):
        return f"adapter {', '.join(other)} is of a variant of LoRA whose effective weights are unknown"
    alone = bool(decomposed) or not _stacks(layer)
    if len(active) > 1 and alone:
        return (
            f"several adapters are active ({named}), and their changes can't be added up here. Activate one "
            f"with set_adapter"
        )
    return _quantised(layer)


def _stacks(layer: Any) -> bool:
    """Return whether several adapters of a layer can be written as one: their factors side by side."""
    return hasattr(layer, "lora_A") and not hasattr(layer, "parameter_name")


def _quantised(layer: Any) -> str:
    if not hasattr(layer, "lora_A"):
        return ""
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
    if (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and weight.itemsize > 1
        and type(weight.data) in (Tensor, nn.Parameter)
    ):
        return ""
    kind = weight.dtype if isinstance(weight, Tensor) else "packed"
    return f"the weights under its adapter are quantised ({kind}), so they can't be read. Load it unquantised"


def _take(now: _Now, name: str, layer: Any, mine: Mapping[str, Tensor], *, untouched: bool) -> None:
    """Take over those tensors of a layer's adapters that count now."""
    active = _active(layer)
    if not active:
        return
    if hasattr(layer, "lora_A"):
        _factors(now, name, layer, mine, active=active, untouched=untouched)
    elif hasattr(layer, "token_indices"):
        now.tokens[bare_name(f"{name}.weight").removesuffix(".weight")] = list(layer.token_indices[active[0]])
        now.tensors |= {key: one for key, one in mine.items() if "trainable_tokens_delta" in key}
    else:
        saved = f"{name}.modules_to_save.{active[0]}."
        kept = {key: one for key, one in mine.items() if key.startswith(saved)}
        if any("." in key.removeprefix(saved) for key in kept):
            now.unclear[name] = f"{name}: a module with parts of its own was trained whole (modules_to_save)"
        else:
            now.tensors |= kept


def _factors(
    now: _Now, name: str, layer: Any, mine: Mapping[str, Tensor], *, active: list[str], untouched: bool
) -> None:
    if hasattr(layer, "parameter_name"):  # a bare parameter: wrappers are nested, one for each
        now.parameters.append(bare_name(f"{name}.{layer.parameter_name}"))
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in mine.items():
        kind, _, rest = key.removeprefix(f"{name}.").partition(".")
        adapter, _, leaf = rest.partition(".")
        if adapter in active:
            parts.setdefault((kind, leaf), {})[adapter] = tensor
    for (kind, leaf), by in parts.items():
        key, side = f"{name}.{kind}.{leaf}".removesuffix("."), kind[-1]
        first = next(iter(by.values()))
        if len(by) == 1:
            now.tensors[key], now.scales[key] = first, layer.scaling[next(iter(by))]
            continue
        scales = [1.0 if side == "A" else layer.scaling[adapter] for adapter in by]
        value = partial(_together, list(by.values()), scales, dim=int(side == "B"), untouched=untouched)
        now.tensors[key] = torch.empty_like(value(), device="meta")
        now.elsewhere[key], now.scales[key] = value, 1.0


def _together(tensors: list[Tensor], scales: list[float], *, dim: int, untouched: bool) -> Tensor:
    """Return factors of several adapters as one: A below A, scale · B beside scale · B, and biases added."""
    scaled = [value_of(one, untouched=untouched) * s for one, s in zip(tensors, scales, strict=True)]
    return torch.cat(scaled, dim=dim) if scaled[0].ndim > 1 else torch.stack(scaled).sum(0)
