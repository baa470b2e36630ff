"""Follow the forward passes of a model, and keep the moment of the one that is running.

A hook deep inside a model sees tensors, but no tokens. So hooks note what goes in where a pass begins: at the
model, or below its head where a part of it is called by itself. A step of `generate` is known from what
`generate` says of it. Any other pass that continues a cache is a further step where the cache was filled in
the same block and gets one more token; behind another cache, all up to the end of the pass is the prompt.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from affectlens.lens.hooks.frames import nearest, runs
from affectlens.lens.hooks.positions import Moment
from affectlens.lens.hooks.recomputing import differentiable, recomputes
from affectlens.lens.hooks.steps import CACHES, Passing, held, passing, told, untold
from affectlens.lens.hooks.telling import Telling, tells
from affectlens.lens.inputs.named_spans import TokenReader
from affectlens.lens.live import ANSWER, UNSEEN, answering, config_of, encodes, inner
from affectlens.lens.restoring import Swaps, refuse_copy

_OTHER_ENCODER = "the encoder ran before this block or on other tokens"


class Moments:
    """Follow the forward passes of a model, and keep the moment of the one that is running."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self._model, self._encodes = model, encodes(model)
        self._reader = TokenReader(config_of(model), tokenizer)
        self._now: dict[str, Moment | None] = {}
        self._telling = Telling()
        self._outer: FrameType | None = None  # the call of the module where the running pass began
        # The last pass that filled each cache; a state that is a list can't be a key.
        self._filled: WeakKeyDictionary[Any, Moment] = WeakKeyDictionary()
        self._state: tuple[object, Moment] | None = None
        self._encoded: tuple[ref[Tensor], Moment] | None = None  # the encoder's last output
        self.passes = 0
        self.graded = True  # whether a backward pass may follow the running one
        self.ignores = False  # a draft of the model's own runs, which changes no answer

    __reduce_ex__ = refuse_copy

    def follow(self, swaps: Swaps) -> None:
        """Listen to the model, and install the hooks that follow it, until the swaps are undone."""
        for module, hook, side in self.entrances():
            if tells(module) and side == "enter":
                swaps.run(partial(self.listen, module), partial(self._telling.stop, module))
            swaps.hook(module, hook, side=side)

    def listen(self, module: nn.Module) -> None:
        """Learn from the `generate` of a module, if it has one, what its passes compute."""
        if tells(module):
            self._telling.listen(module)

    def entrances(self) -> Iterator[tuple[nn.Module, Callable[..., None], str]]:
        """Yield each module in which a pass may begin, with the hooks that follow it and their sides."""
        # `generate` calls the model inside PEFT's wrapper, not the wrapper.
        answers = inner(answering(self._model))
        for module in _below(answers):
            yield module, self._entered, "enter"
            yield module, self._left, "leave"
        if self._encodes:
            encoder: nn.Module = answers.get_encoder()  # type: ignore[operator]
            yield encoder, self._encoding, "enter"
            yield encoder, self._has_encoded, "leave"

    def forget(self) -> None:
        """Drop the last moments, and with them the tensors that the model was called with."""
        self._now.clear()
        self._filled.clear()
        self._state = self._encoded = self._outer = None
        self._telling.step, self._telling.calls = None, []

    @property
    def encoder(self) -> Moment | None:
        """The moment of the encoder; None in a model without one, or with one that reads no tokens."""
        return self._now.get("encoder")

    def now(self, stack: str | None, shape: Sequence[int]) -> Moment | None:
        """Return the moment of the running pass for a tensor of this shape; None where no tokens went in.

        An encoder and a decoder have a moment each. Inside the decoder, cross-attention handles tensors of
        the encoder's shape, so the shape decides which of the two it is.
        """
        # Where a layer is called by itself, the last moment is that of other tokens. A backward pass may run
        # layers again.
        if self._outer is None and not recomputes():
            return None
        first = self._now.get(stack or "")
        there = [one for one in (first, *self._now.values()) if one is not None]
        fits = (one for one in there if tuple(shape[:2]) == (len(one.own), one.length))
        return next(fits, there[0] if there else None)

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if UNSEEN.get() or recomputes() or runs(self._outer):
            return
        self._outer = nearest(_is_call)
        self.graded = differentiable()
        step = self._telling.taken()
        self.ignores = step is not None and step.call.draft
        if self.ignores:
            return
        self.passes += 1
        passed = passing(module, args, kwargs=kwargs, whole=module is inner(answering(self._model)))
        moment = None
        if passed is not None:
            earlier = self._last_of(passed.cache)
            holds = held(passed.cache, earlier)
            if step is not None:
                moment = told(step, passed, holds=holds, reader=self._reader)
            else:
                moment = untold(passed, earlier=earlier, holds=holds, reader=self._reader)
            moment = moment.asked(ANSWER.get())
        self._now["decoder" if self._encodes else ""] = moment
        if self._encodes and moment is not None:
            self._now["encoder"] = self._read(moment.call, step.call.encoded if step is not None else None)

    def _left(self, module: nn.Module, args: object, kwargs: Mapping[str, Any], out: object) -> None:
        if UNSEEN.get() or recomputes() or self._outer is None or nearest(_is_call) is not self._outer:
            return
        self._outer, self.graded = None, True
        ignored, self.ignores = self.ignores, False
        moment = self._now.get("decoder" if self._encodes else "")
        if ignored or moment is None or out is None:  # without an output, an error has ended the pass
            return
        light, places = moment.kept(), (out if isinstance(out, Mapping) else {}, kwargs)
        for cache in (place.get(name) for place in places for name in CACHES):
            if _is_key(cache):
                self._filled[cache] = light
            elif cache is not None:
                self._state = (cache, light)

    def _last_of(self, cache: object) -> Moment | None:
        """Return the last pass of this block that filled a cache."""
        if cache is None or (self._state is not None and self._state[0] is cache):
            return self._state[1] if cache is not None and self._state is not None else None
        return self._filled.get(cache) if _is_key(cache) else None

    def _encoding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if UNSEEN.get() or recomputes():
            return
        if not runs(self._outer):  # `generate` runs the encoder by itself
            self._outer = nearest(_is_call)
            self.graded = differentiable()
        passed = passing(module, args, kwargs=kwargs, whole=False)
        found = None if passed is None else untold(passed, earlier=None, holds=0, reader=self._reader)
        self._now["encoder"] = found

    def _has_encoded(self, module: nn.Module, args: object, kwargs: object, out: Any) -> None:
        if UNSEEN.get() or recomputes():
            return
        if nearest(_is_call) is self._outer:
            self._outer, self.graded = None, True
        found, states = self._now.get("encoder"), getattr(out, "last_hidden_state", None)
        self._encoded = (ref(states), found) if found is not None and isinstance(states, Tensor) else None

    def _read(self, call: Mapping[str, Any], before: Tensor | None) -> Moment | None:
        """Return the moment of the encoder's output that a decoder is given; None if it is given none.

        `before` is that output before `generate` repeated its rows.
        """
        given, states, mask = (
            call.get("encoder_outputs"),
            call.get("encoder_hidden_states"),
            "encoder_attention_mask",
        )
        if given is not None:
            states, mask = given[0], "attention_mask"
        encoder: nn.Module = inner(answering(self._model)).get_encoder()  # type: ignore[operator]
        if not isinstance(states, Tensor) or "input_ids" not in inspect.signature(encoder.forward).parameters:
            return None
        last, known = (None, None) if self._encoded is None else (self._encoded[0](), self._encoded[1])
        if known is not None and (last is states or (last is before and before is not None)):
            return known if len(known.own) == len(states) else known.repeated(len(states) // len(known.own))
        passed = Passing(call, states, call.get(mask), None, states.device, False)
        return replace(untold(passed, earlier=None, holds=0, reader=self._reader), untold=_OTHER_ENCODER)


def _is_key(cache: object) -> bool:
    return cache is not None and isinstance(cache, Hashable) and not isinstance(cache, tuple)


def _is_call(frame: FrameType) -> bool:
    return frame.f_code.co_name == "_call_impl"


def _below(part: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in which a pass of the text may begin: the model, and those below its head."""
    while True:
        yield part
        goal: nn.Module = part.get_decoder() if hasattr(part, "get_decoder") else part  # type: ignore[operator]
        between = list(_path(part, goal))
        yield from between[:-1]
        if not between or goal is part:
            return
        part = goal


def _path(part: nn.Module, goal: nn.Module) -> list[nn.Module]:
    """Return the models below `part` that contain `goal`, outermost first; it is the last one."""
    for child in part.children():
        if child is goal:
            return [child]
        # Only models within models: a walk through all modules would make each block slower to enter.
        below = _path(child, goal) if hasattr(child, "base_model_prefix") else []
        if below:
            return [child, *below]
    return []
