"""Learn from `generate` itself which prompt it continues, and what each of its passes computes.

    generate ── _validate_model_kwargs ─────────▶ the sizes of the media
             ── _expand_inputs_for_generation ──▶ Generating: the prompt, a row for each beam
             ── prepare_inputs_for_generation ──▶ Step: all tokens so far ── the next forward pass

From the tensors of a pass alone, a draft of assisted decoding looks like a prompt, a part of a long prompt
like an answer, and each step without a cache like a new input. The methods above know better; a block
hides them behind methods of the model's instance, and removes those again.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import FrameType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from affectlens.lens.hooks.frames import nearest, runs
from affectlens.lens.inputs.media_items import NO_SIZES, Sizes, sizes_of

_GIVEN = "_validate_model_kwargs"  # before transformers encodes the media and drops them
_EXPAND, _PREPARE = "_expand_inputs_for_generation", "prepare_inputs_for_generation"
_NAMES = (_GIVEN, _EXPAND, _PREPARE)


@dataclass(eq=False)
class Generating:
    """One call of `generate`: its prompt, with a row for each beam."""

    ids: Tensor  # (batch, position); without positions where embeddings are given
    settings: dict[str, Any]  # the arguments of its passes, as they are before the first one
    encoded: Tensor | None  # the encoder's output, before its rows were repeated
    sizes: Sizes  # of the media
    beams: int  # so many rows in a row are one example
    frame: FrameType  # of `generate`: the call lasts as long as this runs
    draft: bool = False  # the model also runs as its own assistant, with fewer layers
    prompt: int | None = None  # the number of positions of the prompt, known from the first pass on
    seen: int = 0  # the positions that its passes have computed
    blind: str = ""  # why its positions are unknown, if so


@dataclass(eq=False)
class Step:
    """What `generate` says of its next pass."""

    call: Generating
    ids: Tensor  # all tokens so far, drafts included; in a long prompt taken in pieces, one piece
    begins: bool  # the prompt, or a piece of it, passes


@dataclass(eq=False)
class Telling:
    """What `generate` says of a model while a block listens; `step` is about the next pass."""

    step: Step | None = None
    sizes: Sizes = NO_SIZES  # of the media of the call that begins
    calls: list[Generating] = field(default_factory=list)  # those that run, outermost first

    def listen(self, module: nn.Module) -> None:
        """Listen to a model's `generate` until `stop`."""
        if module not in _LISTENING:
            own = vars(module)
            _LISTENING[module] = _Listening({name: own[name] for name in _NAMES if name in own})
            for name, telling in ((_GIVEN, _given), (_EXPAND, _expanding), (_PREPARE, _preparing)):
                method = getattr(module, name)
                # transformers reads the signature of these methods.
                own[name] = MethodType(wraps(getattr(method, "__func__", method))(telling), module)
        _LISTENING[module].blocks.append(self)

    def stop(self, module: nn.Module) -> None:
        """Stop listening; the last one gives the model its own methods back."""
        there = _LISTENING.get(module)
        if there is None:
            return
        self.step, self.calls = None, []  # a frame would keep what it runs on alive
        there.blocks = [one for one in there.blocks if one is not self]
        if not there.blocks:
            for name in _NAMES:
                vars(module).pop(name, None)
            vars(module).update(there.before)
            del _LISTENING[module]

    def call(self) -> Generating | None:
        """Return the innermost call of `generate` that runs now."""
        self.calls = [call for call in self.calls if runs(call.frame)]
        return self.calls[-1] if self.calls else None

    def taken(self) -> Step | None:
        """Return what was said of the pass that begins now, once; None where nothing was."""
        step, self.step = self.step, None
        return step if step is not None and runs(step.call.frame) else None


def tells(module: nn.Module) -> bool:
    """Return whether a module has a `generate` to listen to."""
    return all(hasattr(module, name) for name in _NAMES)


@dataclass(eq=False)
class _Listening:
    """Who listens to a model. Blocks may be left in any order, so none of them owns the methods."""

    before: dict[str, Any]  # attributes that the model's instance had itself
    blocks: list[Telling] = field(default_factory=list)


_LISTENING: WeakKeyDictionary[nn.Module, _Listening] = WeakKeyDictionary()


def _own(module: nn.Module, name: str) -> tuple[Callable[..., Any], list[Telling]]:
    """Return a module's own method, and who listens: nobody to a copy that was made in a block."""
    there = _LISTENING.get(module)
    if there is not None and name in there.before:
        return there.before[name], there.blocks
    method = inspect.getattr_static(type(module), name).__get__(module, type(module))
    return method, there.blocks if there is not None else []


def _given(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    method, blocks = _own(self, _GIVEN)
    given = args[0] if args else kwargs.get("model_kwargs")
    for one in blocks:
        one.sizes = sizes_of(given) if isinstance(given, dict) else NO_SIZES
    return method(*args, **kwargs)


def _expanding(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    method, blocks = _own(self, _EXPAND)
    # Read before the call, which repeats its rows in place.
    encoded = getattr(kwargs.get("encoder_outputs"), "last_hidden_state", None)
    given = kwargs.get("input_ids")
    found = method(*args, **kwargs)
    frame = nearest(lambda one: one.f_code.co_name == "generate")
    for one in blocks:
        outer = one.call()
        if frame is not None and isinstance(given, Tensor) and isinstance(found[0], Tensor):
            beams = max(1, len(found[0]) // max(1, len(given)))
            call = Generating(
                found[0], dict(found[1]), encoded, one.sizes, beams, frame, draft=outer is not None
            )
            one.calls.append(call)
    return found


def _preparing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    method, blocks = _own(self, _PREPARE)
    found = method(*args, **kwargs)
    ids, begins = args[0] if args else kwargs.get("input_ids"), bool(kwargs.get("is_first_iteration"))
    for one in blocks:
        call = one.call()
        one.step = None if call is None or not isinstance(ids, Tensor) else Step(call, ids, begins)
    return found
