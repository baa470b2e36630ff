"""Attach hooks to a bridge: at its own hook points where it has one for a point, and for good.

A bridge puts a wrapper in the place of a module, under the module's own name, with a hook point before and
after it. So a place in the model leads to its hook point; what names say is checked against that. Of a fused
matrix the wrapper is passed by: the bridge computes with the parts, and each has hook points of its own.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from einops import rearrange
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, Remark
from affectlens.lens.doors.names import hook_name
from affectlens.lens.hooks.hooking import Hook
from affectlens.lens.hooks.places import module_name
from affectlens.lens.restoring import collect_last

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge


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
