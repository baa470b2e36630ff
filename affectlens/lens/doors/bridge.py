"""The door to TransformerLens: a bridge over a copy of the lens's model, with interventions applied for good.

    lens.model ──▶ deep copy ── weights, by pointer ──▶ booted ── activations, at its own hooks ──▶ bridge

The bridge owns the copy: it wraps and changes its modules, forces eager attention, and processes weights if
asked to. The lens and its model stay unchanged; the interventions last as long as the bridge.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from affectlens.checkpoints.adapters.attached import adapter_layers
from affectlens.errors import LensError
from affectlens.lens.doors.booting import adapter_of, boot
from affectlens.lens.doors.hook_points import attach
from affectlens.lens.intervening import ActivationIntervention, Intervening, Intervention
from affectlens.lens.live import Live, inner, over, refuse_compiled, refuse_whole

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def bridge(
    lens: Live,
    *interventions: Intervention | ActivationIntervention,
    dtype: torch.dtype | str | None = None,
) -> "TransformerBridge":
    """Build a `TransformerBridge` over a copy of a lens's model; it needs the memory of a second model.

    Interventions are applied to the copy in order and for good: to its weights before it is booted, to its
    activations as permanent hooks, which `run_with_hooks`, `run_with_cache` and `reset_hooks()` keep.
    Attention is eager, which TransformerLens needs to show patterns: logits equal those of the lens to the
    bit only if its model is eager too. `dtype` is that of the copy (None: the model's own). A PEFT adapter is
    merged into the copy.

    Run it on a batch of the lens, media included: `bridge(**bridge_input(bridge, lens.prepare(example)))`.
    Generate with `bridge.original_model.generate`. TransformerLens's own patching utilities take token ids
    only and silently drop pictures and sounds.

    Nothing is downloaded or installed. Raises `LensError` for a model that has no adapter, has hooks on it,
    or is offloaded or compiled, and for a point that the bridge bypasses; `MissingExtra` where an adapter
    needs a package.
    """
    refuse_whole(lens.model)
    model = inner(lens.model)
    adapt = adapter_of(model)
    _refuse_uncopyable(lens.model)
    with torch.no_grad():
        copied = _copied(lens, _dtype(dtype))
        with Intervening(copied, interventions) as block:
            pass
        for owner, name, value in block.swaps:
            # The value may be the donor's own tensor, which the bridge must not change.
            setattr(owner, name, value.clone() if isinstance(value, Tensor) else value)
    live = copied.checkpoint  # before a bridge replaces modules of the copy
    built = boot(copied.model, adapt, processor=copied.processor)
    attach(built, block.hooks, live=live)
    return built


def bridge_input(bridge: "TransformerBridge", batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Turn a prepared batch into the input of a bridge, so that both compute the same.

    A bridge names `input_ids` `input`, and by default counts the positions of padded rows differently.
    """
    found: dict[str, Any] = {"use_cache": False}
    for name, tensor in batch.items():
        typed = tensor.to(bridge.cfg.dtype) if tensor.is_floating_point() else tensor
        found["input" if name == "input_ids" else name] = typed
    ids = batch.get("input_ids")
    if ids is not None and "position_ids" not in batch and bridge._accepts_derived_position_ids():
        found["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return found


def _refuse_uncopyable(model: nn.Module) -> None:
    """Raise `LensError` for a model whose copy would share state with it."""
    refuse_compiled(model)
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if hasattr(module, "_hf_hook"):
            raise LensError(
                f"{where} is dispatched by accelerate; load the model onto one device to bridge it"
            )
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # Hooks that transformers leaves in place to collect hidden states share no state: they may be copied.
        if not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            raise LensError(
                f"{where} has hooks, which a copy would share; call bridge(...) outside any block, and pass "
                f"the interventions to it"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise LensError(f"{name} is on the meta device, so it can't be copied; load its weights first")


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is not None and not isinstance(found, torch.dtype):
        raise LensError(f"{asked!r} is not a torch dtype; try 'float32' or 'bfloat16'")
    return found


def _copied(lens: Live, dtype: torch.dtype | None) -> Live:
    """Copy the model of a lens, with its adapter merged, and return a lens over the copy."""
    model = copy.deepcopy(lens.model)
    if next(adapter_layers(model), None) is not None:
        model = _without_layers(model, off=lens.adapters_off)
    for name, parameter in model.named_parameters() if dtype is not None else ():
        if not parameter.is_floating_point():
            raise LensError(
                f"{name} is quantised ({parameter.dtype}), so it can't be cast to {dtype}; leave dtype out"
            )
        # Buffers stay in float32, as they do when a model is loaded in another dtype.
        parameter.data = parameter.data.to(dtype)
    found = over(lens, model, processor=copy.deepcopy(lens.processor))
    found.adapters_off = False
    return found


def _without_layers(model: nn.Module, *, off: bool) -> nn.Module:
    """Merge the active adapters of a copy, or take out those that are disabled. Raises `LensError`."""
    disabled = {off or layer.disable_adapters for _, layer in adapter_layers(model)}
    if not hasattr(model, "merge_and_unload") or len(disabled) > 1:
        why = "are disabled in some layers only" if len(disabled) > 1 else "have no wrapper of PEFT"
        raise LensError(f"the adapters of this {type(model).__name__} {why}; merge or delete them first")
    found: nn.Module = model.unload() if disabled.pop() else model.merge_and_unload()  # type: ignore[operator]
    return found
