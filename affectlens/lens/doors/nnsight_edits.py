"""Edits of nnsight that call the hooks of a lens; importing this imports nnsight.

nnsight does not run a `with` block in place: it reads the block's source and runs it beside the model in each
trace, waiting for each value that the block asks for. So these blocks keep to what nnsight can parse: they
start on their own line, and not with `try`.
"""

import gc
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from nnsight import NNsight
from nnsight.intervention.envoy import traceable
from nnsight.intervention.interleaver import Interleaver, OutOfOrderError
from nnsight.intervention.source import STATE
from torch import nn

from affectlens.lens.hooks.hooking import Hook
from affectlens.lens.hooks.moments import Moments
from affectlens.lens.intervening import ActivationIntervention, Intervening, Intervention, warn_of_idle
from affectlens.lens.live import Live
from affectlens.lens.restoring import Swaps, atomic, raise_waiting

# A module's `forward` before nnsight replaced it; None for that of its class.
_BEFORE: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

# Weights are put back here after an error; a second interrupt must not break into it.
atomic(Interleaver.cancel)


class Wrapped(NNsight):  # type: ignore[misc]
    """An `NNsight` that restores its modules when it is deleted or its `with` block ends."""

    def __init__(self, model: nn.Module) -> None:
        # If an earlier wrapper were collected now, it would unwrap modules that are being wrapped.
        collecting = gc.isenabled()
        gc.disable()
        try:
            for module in model.modules():
                if STATE not in module.__dict__:
                    _BEFORE[module] = module.__dict__.get("forward")
            NNsight.__init__(self, model)
        except BaseException:
            _unwrap(model.modules(), self.__dict__.get("interleaver"))
            raise
        finally:
            if collecting:
                gc.enable()
        weakref.finalize(self.interleaver, _unwrap, list(model.modules())).atexit = False

    @traceable  # type: ignore[untyped-decorator]
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the edits: called for the tokens, or as a `with` block to trace it."""
        return self._module.generate(*args, **kwargs)

    def __enter__(self) -> "Wrapped":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear_edits()
        _unwrap(self._module.modules(), self.interleaver)


def _unwrap(modules: Iterable[nn.Module], interleaver: Any = None) -> None:
    """Remove nnsight from modules that no other `NNsight` wraps."""
    for module in modules:
        state = module.__dict__.get(STATE)
        if state is None or module not in _BEFORE:  # wrapped by other code
            continue
        state.routes = [route for route in state.routes if route[0]() not in (None, interleaver)]
        if state.routes:
            continue
        before = _BEFORE.pop(module)
        del module.__dict__[STATE]
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


class Run:
    """Block around one run: swaps weights in, and tracks positions for the hooks."""

    def __init__(
        self,
        lens: Live,
        weights: Sequence[Intervention | ActivationIntervention],
        *,
        moments: Moments,
        hooks: Sequence[Hook],
    ) -> None:
        self._lens, self._weights, self._moments, self.hooks = lens, weights, moments, hooks
        self._changes = Intervening(lens, weights, held=False)  # nnsight enters it in a thread of its own
        self._following = Swaps()
        self.whole = False

    def module(self, hook: Hook) -> nn.Module:
        """Return the module at which a hook is called."""
        return self._lens.model.get_submodule(hook.place.module)

    @atomic
    def __enter__(self) -> "Run":
        self.whole, self._moments.passes = False, 0
        for hook in self.hooks:
            hook.reached = 0
        self._changes.__enter__()
        try:
            if self.hooks:
                self._moments.follow(self._following)
            raise_waiting()
        except BaseException:
            self._leave()
            raise
        return self

    @atomic
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._leave()
        if self.whole:
            warn_of_idle(self.hooks, passes=self._moments.passes)
        # Ends nnsight blocks that wait for values which never come.
        return kind is not None and issubclass(kind, OutOfOrderError)

    @atomic
    def _leave(self) -> None:
        try:
            self._following.undo()
        finally:
            self._changes.__exit__(None)


def edit(wrapped: Wrapped, run: Run) -> None:
    """Store the edits of a run: its own comes before all others, and ends when everything else has."""
    # A block keeps the variables of its function, and the wrapper keeps the block: a strong reference would
    # keep wrapper and model alive until the garbage collector runs.
    unowned = weakref.proxy(wrapped)
    _edit_run(unowned, run)
    envoys = {id(envoy._module): envoy for envoy in wrapped.modules()}
    for hook in run.hooks:
        _edit_place(unowned, envoys[id(run.module(hook))], hook=hook)


def _edit_run(wrapped: Any, run: Run) -> None:
    # Two blocks: the outer one is entered now, the inner one at each run.
    with wrapped.edit(inplace=True) as tracer:  # noqa: SIM117
        with run:
            # The result comes once; waiting for a second one lasts until the run is over.
            for _ in tracer.iter[:]:
                tracer.result  # noqa: B018
                run.whole = True


def _edit_place(wrapped: Any, envoy: Any, *, hook: Hook) -> None:
    with wrapped.edit(inplace=True) as tracer:  # noqa: SIM117
        with suppress(OutOfOrderError):
            for _ in tracer.iter[:]:  # each call of the module, so each step of `generate`
                _passed(envoy, hook)


def _passed(envoy: Any, hook: Hook) -> None:
    if hook.side == "output":
        value = envoy.output
        new = hook(envoy._module, (), {}, value)
        if new is not None:
            envoy.output = new
    else:
        args, kwargs = envoy.inputs
        new = hook(envoy._module, args, kwargs)
        if new is not None:
            envoy.inputs = new
