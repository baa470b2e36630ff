"""Translate between our points and the hook names of TransformerLens, and attach our hooks there.

    language.12.gate_proj@pre_activation ⟷ blocks.12.mlp.hook_pre

The table is tested by values on live models, since names mislead: TransformerLens calls the router of a
mixture of experts `mlp.gate`, and there `mlp.hook_pre` is the input of the mixture. Points of experts, of
norms inside layers, and of vision and audio towers have no name here.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from einops import rearrange
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, Remark, near, quoted
from affectlens.lens.hooks.hooking import Hook
from affectlens.lens.hooks.places import module_name
from affectlens.lens.restoring import collect_last
from affectlens.sites import ATTENTION, MLP, Point, Site

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

_UNGATED = ("fc1", "fc2")
# (role, kind) → end of the hook's name in `blocks.L`. Of rows with one name, the first translates it back.
_IN_LAYERS: Mapping[tuple[str, str], str] = {
    ("gate_proj", "pre_activation"): "mlp.hook_pre",
    ("gate_proj", "output"): "mlp.hook_pre",
    ("up_proj", "output"): "mlp.hook_pre_linear",
    ("down_proj", "gated"): "mlp.hook_post",
    ("down_proj", "input"): "mlp.hook_post",
    ("down_proj", "output"): "mlp.out.hook_out",
    ("gate_proj", "input"): "mlp.gate.hook_in",
    ("up_proj", "input"): "mlp.in.hook_in",
    ("q_proj", "output"): "attn.hook_q",
    ("k_proj", "output"): "attn.hook_k",
    ("v_proj", "output"): "attn.hook_v",
    ("o_proj", "heads"): "attn.hook_z",
    ("o_proj", "input"): "attn.hook_z",
    ("o_proj", "output"): "attn.o.hook_out",
    ("o_proj", "residual"): "hook_resid_post",
    **{(role, "pre_activation"): "mlp.hook_pre" for role in ("up_proj", "down_proj")},
    **{(role, "gated"): "mlp.hook_post" for role in ("gate_proj", "up_proj")},
    **{(role, "heads"): "attn.hook_z" for role in ATTENTION},
    **{(role, "residual"): "hook_resid_post" for role in (*MLP, *ATTENTION, *_UNGATED, "norm")},
    # In an MLP without a gate, the same names mean other modules.
    ("fc1", "output"): "mlp.hook_pre",
    **{(role, "pre_activation"): "mlp.hook_pre" for role in _UNGATED},
    **{(role, "gated"): "mlp.hook_post" for role in _UNGATED},
    ("fc1", "input"): "mlp.in.hook_in",
    ("fc2", "input"): "mlp.hook_post",
    ("fc2", "output"): "mlp.out.hook_out",
}
_AROUND: Mapping[tuple[str, str], str] = {
    ("embed_tokens", "output"): "embed.hook_out",
    ("lm_head", "input"): "unembed.hook_in",
    ("lm_head", "output"): "unembed.hook_out",
    ("norm", "input"): "ln_final.hook_in",
    ("norm", "output"): "ln_final.hook_out",
}
_FINAL = ("", "norm", "ln_f", "final_layernorm", "final_layer_norm")  # other norms are around embeddings
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def hook_name(point: Point) -> str:
    """Return TransformerLens's hook name for a point. Raises `LensError` where there is none.

    Heads and neurons are features of the whole hook: `hook_z` is (batch, position, head, feature).

    >>> hook_name(Point(Site("language", "gate_proj", layer=12), "pre_activation"))
    'blocks.12.mlp.hook_pre'
    """
    site = point.site
    if site.tower != "language":
        raise LensError(
            f"{point!r}: TransformerLens has hook names for the language tower only, not for {site.tower}"
        )
    if site.expert is not None or "shared_expert" in site.label:
        raise LensError(f"{point!r}: TransformerLens has no hook inside experts")
    if site.stack is not None:
        raise LensError(
            f"{point!r}: in models with two stacks of layers, hook names depend on the architecture"
        )
    table = _AROUND if site.layer is None else _IN_LAYERS
    name = table.get((site.role, point.kind))
    if name is None or (name[:8] == "ln_final" and site.label.rpartition(".")[2] not in _FINAL):
        there = ", ".join(sorted({f"{role}@{kind}" for role, kind in table}))
        raise LensError(f"{point!r} has no hook name in TransformerLens. Points with one: {there}")
    return name if site.layer is None else f"blocks.{site.layer}.{name}"


def point_of(name: str, sites: Iterable[Site] | None = None) -> Point:
    """Return the point, at all positions, of a hook name; among a model's `sites`, where they are given.

    Without `sites` a gated language model is assumed. Raises `LensError` for a name without a point.

    >>> point_of("blocks.12.mlp.hook_post")
    language.12.down_proj@gated
    """
    inside = _LAYER.fullmatch(name)
    table, end = (_IN_LAYERS, inside[2]) if inside else (_AROUND, name)
    layer = int(inside[1]) if inside else None
    meant = [
        Point(Site("language", role, layer=layer), kind)
        for (role, kind), known in table.items()
        if known == end
    ]
    if sites is not None:
        there = {
            (s.role, s.layer): s for s in sites if (s.tower, s.stack, s.param) == ("language", None, "weight")
        }
        meant = [replace(p, site=there[key]) for p in meant if (key := (p.site.role, p.site.layer)) in there]
        meant = [p for p in meant if p.site.expert is None]
    if not meant:
        raise LensError(
            f"{quoted(name)} has no point in affectlens. Hooks that have one: "
            f"{near(end, dict.fromkeys(table.values()))}"
        )
    return meant[0]


def attach(bridge: "TransformerBridge", hooks: Sequence[Hook], *, live: Checkpoint) -> None:
    """Attach hooks at their points in a bridge. Raises `LensError` for a point that the bridge bypasses."""
    from transformer_lens.hook_points import HookPoint

    found = [(hook, *_place(bridge, hook, live)) for hook in hooks]
    for moments in dict.fromkeys(hook.moments for hook in hooks):
        for module, follow, side in moments.entrances():
            if side == "enter":
                moments.listen(module)
                module.register_forward_pre_hook(follow, with_kwargs=True, prepend=True)
            else:
                module.register_forward_hook(follow, with_kwargs=True, always_call=True)
    attached = []
    for hook, place, features in found:
        own = replace(hook, place=hook.place._replace(features=features))
        attached.append(own)
        if isinstance(place, HookPoint):
            place.add_hook(_as_theirs(own), is_permanent=True)
        elif hook.side == "output":
            place.register_forward_hook(own, with_kwargs=True)
            collect_last(place)
        else:
            place.register_forward_pre_hook(own, with_kwargs=True)
    if attached:
        _told_of_unreached(bridge.original_model, attached)


def _told_of_unreached(model: nn.Module, hooks: Sequence[Hook]) -> None:
    """After the first forward pass, warn of points that were not reached, e.g. of an unused tower."""

    def _after(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        for hook in hooks:
            if not hook.reached and hook.point.span is None:
                warnings.warn(
                    f"the first pass of this bridge did not reach {hook.point!r}", Remark, stacklevel=2
                )

    handle = model.register_forward_hook(_after)


def _place(bridge: "TransformerBridge", hook: Hook, live: Checkpoint) -> tuple[nn.Module, Any]:
    """Return the hook point or module of a bridge for a point, and the features there that belong to it."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    point, place = hook.point, hook.place
    at, around = _walk(bridge.original_model, place.module)
    if place.side == "mask":
        return at, place.features
    if place.positional and (part := _part(bridge, hook, live)) is not None:
        unit = live.at(point.site).unit
        if hook.side == "input":
            return around.hook_in, place.features  # a fused matrix has one input for all its parts
        return part, None if unit is None else range(unit.start, unit.stop)
    inner = () if around is None else (c for c in around.modules() if isinstance(c, GeneralizedComponent))
    wrapper = at if isinstance(at, GeneralizedComponent) else None
    wrapper = wrapper or next((one for one in inner if one.original_component is at), None)
    if wrapper is not None:
        # transformers may collect the output of a tower's layer before it reaches the wrapper's hook.
        if point.kind == "residual" and not place.positional:
            return wrapper.original_component, place.features
        return (wrapper.hook_out if hook.side == "output" else wrapper.hook_in), place.features
    # Modules in a tower's wrapper, or in none, run unchanged; inside a layer the bridge may bypass them.
    if around is None or not place.positional or type(around) is GeneralizedComponent:
        return at, place.features
    raise LensError(
        f"{point!r}: the bridge bypasses {place.module}, so nothing can be changed there; use lens.intervene"
    )


def _part(bridge: "TransformerBridge", hook: Hook, live: Checkpoint) -> "HookPoint | None":
    """Return the hook point of a part of a fused matrix, if the bridge computes the parts one by one."""
    point, module = hook.point, hook.place.module
    if point.kind not in ("output", "input", "pre_activation"):
        return None
    if not any(where.cut is not None and module_name(where) == module for where in live.storage.values()):
        return None
    shown = point if point.kind == "pre_activation" else replace(point, kind="output")
    found: HookPoint | None = bridge.hook_dict.get(hook_name(shown))
    return found


def _walk(model: nn.Module, name: str) -> tuple[Any, Any]:
    """Return the module of a name in a bridged model, and the innermost wrapper around it."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    at: Any = model
    around: Any = None
    for part in name.split("."):
        around = at if isinstance(at, GeneralizedComponent) else around
        at = getattr(at, part)
    return at, around


def _as_theirs(own: Hook) -> Callable[..., Tensor | None]:
    """Adapt a hook to TransformerLens, which passes heads apart: (batch, position, head, feature)."""

    def rewritten(tensor: Tensor, hook: "HookPoint") -> Tensor | None:
        if hook.hook_conversion is None or tensor.ndim != 4:
            found: Tensor | None = own(hook, (), {}, tensor)
            return found
        heads = tensor.shape[2]
        flat = rearrange(tensor, "batch position head feature -> batch position (head feature)")
        new: Tensor | None = own(hook, (), {}, flat)
        if new is None:
            return None
        return rearrange(new, "batch position (head feature) -> batch position head feature", head=heads)

    return rewritten
