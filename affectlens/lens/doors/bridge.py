"""The door to TransformerLens: a bridge over a copy of the lens's model, with interventions in it for good.

    lens.model ──▶ deep copy ── weights, by pointer ──▶ booted ── activations, at its own hooks ──▶ bridge

The copy is the bridge's: it wraps and changes its modules, forces eager attention, and processes weights if
asked to. The lens and its model stay as they are. So what is compiled here lasts as long as the bridge.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    """Build a `TransformerBridge` over a copy of a lens's model; takes the memory of a second model.

    Interventions are applied to the copy in order and for good: to its weights before it is booted, to its
    activations as permanent hooks, which `run_with_hooks`, `run_with_cache` and `reset_hooks()` leave alone.
    Attention is eager, as TransformerLens needs it to show patterns: only a lens whose model attends eagerly
    too can have the same logits to the bit. `dtype` is the copy's, the model's own if None. An adapter of
    PEFT is merged into the copy.

    Run it on a lens's batch, media and all: `bridge(**bridge_input(bridge, lens.prepare(example)))`; let it
    answer by `bridge.original_model.generate`. TransformerLens's own patching utilities take token ids alone,
    and drop pictures and sounds in silence.

    Raises `LensError` for a model that has no adapter, has hooks on it, or is offloaded or compiled, and for
    a point that the bridge passes by; `MissingExtra` where an adapter needs a package. Nothing is downloaded,
    and nothing installed.
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
    built = boot(copied.model, adapt, processor=copied.processor)
    attach(built, block.hooks, live=copied.checkpoint)
    return built


def bridge_input(bridge: "TransformerBridge", batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """A prepared batch as a bridge takes it, so that it does what the lens does with it.

    A bridge calls `input_ids` its `input`, and would count the positions of padded rows in its own way.
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
    """Raise `LensError` for a model of which no copy would be a model of its own."""
    refuse_compiled(model)
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if hasattr(module, "_hf_hook"):
            raise LensError(
                f"{where} is placed or offloaded by accelerate; load the model onto one device to bridge it"
            )
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers itself collects hidden states by hooks that it leaves in place, and that share nothing.
        if not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            raise LensError(
                f"{where} has hooks on it, which a copy would share; call bridge(...) outside of any block, "
                f"and give it the interventions"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise LensError(f"{name} is on the meta device, so it can't be copied; load the weights")


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is not None and not isinstance(found, torch.dtype):
        raise LensError(f"{asked!r} is no dtype of torch; try 'float32' or 'bfloat16'")
    return found


def _copied(lens: Live, dtype: torch.dtype | None) -> Live:
    """A lens over a copy of another's model, without an adapter around it."""
    model = copy.deepcopy(lens.model)
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()  # type: ignore[operator]
    for name, parameter in model.named_parameters() if dtype is not None else ():
        if not parameter.is_floating_point():
            raise LensError(
                f"{name} is quantised ({parameter.dtype}), so it can't become {dtype}; leave dtype out"
            )
        # Buffers stay in float32, as they do when a model is loaded in another dtype.
        parameter.data = parameter.data.to(dtype)
    return over(lens, model, processor=copy.deepcopy(lens.processor))
