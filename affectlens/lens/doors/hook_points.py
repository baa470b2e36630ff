"""Names: what TransformerLens calls a point, and which point one of its names is.

    language.12.gate_proj@pre_activation ⟷ blocks.12.mlp.hook_pre

Held to by values on live models, not by how the names sound: TransformerLens calls the router of a mixture
of experts `mlp.gate`, and there `mlp.hook_pre` is what goes into the mixture. Points of experts, of norms in
a layer, and of towers that see and hear have no name here.
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
# (role, kind) → the end of the hook's name, in `blocks.L`. The first of those with one name is what it means.
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
    # An MLP without a gate, where TransformerLens means another module by the same name.
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
    """The name of the hook where TransformerLens sees a point. Raises `LensError` where it has none.

    A head or neuron is among the features of the whole: `hook_z` is (batch, position, head, feature).

    >>> hook_name(Point(Site("language", "gate_proj", layer=12), "pre_activation"))
    'blocks.12.mlp.hook_pre'
    """
    site = point.site
    if site.tower != "language":
        raise LensError(
            f"{point!r}: TransformerLens names what is in the language tower, not in {site.tower}"
        )
    if site.expert is not None or "shared_expert" in site.label:
        raise LensError(f"{point!r}: TransformerLens has no hook inside experts")
    if site.stack is not None:
        raise LensError(
            f"{point!r}: its hook depends on the architecture where there are two stacks of layers"
        )
    table = _AROUND if site.layer is None else _IN_LAYERS
    name = table.get((site.role, point.kind))
    if name is None or (name[:8] == "ln_final" and site.label.rpartition(".")[2] not in _FINAL):
        there = ", ".join(sorted({f"{role}@{kind}" for role, kind in table}))
        raise LensError(f"{point!r} has no name in TransformerLens. Named are: {there}")
    return name if site.layer is None else f"blocks.{site.layer}.{name}"


def point_of(name: str, sites: Iterable[Site] | None = None) -> Point:
    """The point, of all positions, that a hook is about; of a model's own sites, where they are given.

    Without them it is taken to be that of a gated language model. Raises `LensError` for a name that is no
    point of ours.

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
            f"{quoted(name)} is no point of ours. Hooks that are: {near(end, dict.fromkeys(table.values()))}"
        )
    return meant[0]


def attach(bridge: "TransformerBridge", hooks: Sequence[Hook], *, live: Checkpoint) -> None:
    """Let hooks rewrite what passes their points in a bridge. Raises `LensError` where it passes one by."""
    from transformer_lens.hook_points import HookPoint

    found = [(hook, *_place(bridge, hook, live)) for hook in hooks]
    for moments in dict.fromkeys(hook.moments for hook in hooks):
        for module, entered in moments.entrances():
            module.register_forward_pre_hook(entered, with_kwargs=True, prepend=True)
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
    """After the first forward pass, say which points nothing passed, such as a picture's without one."""

    def _after(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        for hook in hooks:
            if not hook.reached and hook.point.span is None:
                warnings.warn(
                    f"nothing passed {hook.point!r} in this bridge's first pass", Remark, stacklevel=2
                )

    handle = model.register_forward_hook(_after)


def _place(bridge: "TransformerBridge", hook: Hook, live: Checkpoint) -> tuple[nn.Module, Any]:
    """The hook point or module of a bridge where a point is, and which of the features there are its own."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    point, place = hook.point, hook.place
    at, around = _walk(bridge.original_model, place.module)
    if place.side == "mask":
        return at, None
    if place.positional and (part := _part(bridge, hook, live)) is not None:
        unit = live.at(point.site).unit
        if hook.side == "input":
            return around.hook_in, place.features  # of a fused matrix, and so of all its parts
        return part, None if unit is None else range(unit.start, unit.stop)
    inner = () if around is None else (c for c in around.modules() if isinstance(c, GeneralizedComponent))
    wrapper = at if isinstance(at, GeneralizedComponent) else None
    wrapper = wrapper or next((one for one in inner if one.original_component is at), None)
    if wrapper is not None:
        # What leaves a tower's layer may be collected by transformers before it reaches the wrapper's hook.
        if point.kind == "residual" and not place.positional:
            return wrapper.original_component, place.features
        return (wrapper.hook_out if hook.side == "output" else wrapper.hook_in), place.features
    # What a tower's wrapper, or none, is around runs as it always did; in a layer it may be passed by.
    if around is None or not place.positional or type(around) is GeneralizedComponent:
        return at, place.features
    raise LensError(f"{point!r}: the bridge passes {place.module} by, so nothing can be changed there")


def _part(bridge: "TransformerBridge", hook: Hook, live: Checkpoint) -> "HookPoint | None":
    """Where the bridge shows a part of a fused matrix that it computes with in parts."""
    point, module = hook.point, hook.place.module
    if point.kind not in ("output", "input", "pre_activation"):
        return None
    if not any(where.cut is not None and module_name(where) == module for where in live.storage.values()):
        return None
    shown = point if point.kind == "pre_activation" else replace(point, kind="output")
    found: HookPoint | None = bridge.hook_dict.get(hook_name(shown))
    return found


def _walk(model: nn.Module, name: str) -> tuple[Any, Any]:
    """What is at a module's name in a model that is bridged, and the innermost wrapper around it."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    at: Any = model
    around: Any = None
    for part in name.split("."):
        around = at if isinstance(at, GeneralizedComponent) else around
        at = getattr(at, part)
    return at, around


def _as_theirs(own: Hook) -> Callable[..., Tensor | None]:
    """A hook as TransformerLens calls it, which shows heads apart: (batch, position, head, feature)."""

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
