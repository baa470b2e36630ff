"""Gradient checkpointing: tell forward passes from their recomputation in the backward pass.

A checkpointed part is run a second time in the backward pass, perhaps after the block that changed it, or
after a pass over other examples. A recording leaves it out; a change of activations there is refused.
"""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from affectlens.errors import LensError
from affectlens.lens.live import answering, compiled, inner
from affectlens.lens.restoring import Swaps, refuse_copy

# The frame in which torch runs a checkpointed part for the first time with use_reentrant=True.
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
_AGAIN = "gradient checkpointing computes this part again in the backward pass, where "
_INSTEAD = ". Call model.gradient_checkpointing_disable()"
NOT_REPEATED = f"{_AGAIN}a change of activations might not be repeated{_INSTEAD}"
NO_GRADIENTS = f"{_AGAIN}the gradients at recorded activations are lost{_INSTEAD}, or use use_reentrant=False"
_LATE = (
    "the backward pass of this forward pass runs outside the block that changed the weights, so its "
    "gradients would be those of other weights. Call backward() inside the block"
)


def recomputes() -> bool:
    """Return whether the running code is called by a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def reentrant() -> bool:
    """Return whether the running part is checkpointed with use_reentrant=True: it runs without gradients."""
    frame: FrameType | None = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False


def differentiable() -> bool:
    """Return whether a backward pass may follow; to be asked where a pass of the model begins."""
    return torch.is_grad_enabled() or reentrant()


def checkpointed() -> bool:
    """Return whether the backward pass will compute the running part again."""
    return _saves_nothing() or reentrant()


def _saves_nothing() -> bool:
    """Return whether torch keeps placeholders instead of tensors: checkpointing with use_reentrant=False."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return bool(hooks) and getattr(hooks[0], "__module__", "") == checkpoint.__name__


def refuse_late(swaps: Swaps, model: nn.Module) -> None:
    """Raise `LensError` in a backward pass after the block that changed the weights of its forward pass."""
    watch = _Watch()
    swaps.note(watch.close)
    part = inner(answering(model))
    if not compiled(part):  # a compiled graph runs no hooks
        swaps.hook(part, watch, side="output")


class _Watch:
    """A forward hook of a model, which attaches the check to what the model returns."""

    def __init__(self) -> None:
        self._open = [True]  # shared with the tensors of all passes

    def close(self) -> None:
        self._open[0] = False

    def __call__(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        if not torch.is_grad_enabled():
            return
        found = output.values() if isinstance(output, Mapping) else output
        for one in found if isinstance(found, Iterable) and not isinstance(found, Tensor) else (found,):
            if isinstance(one, Tensor) and one.requires_grad:
                one.register_hook(partial(_refuse_closed, self._open))  # type: ignore[no-untyped-call]

    __reduce_ex__ = refuse_copy


def _refuse_closed(active: list[bool], gradient: Tensor) -> None:
    if not active[0]:
        raise LensError(_LATE)
