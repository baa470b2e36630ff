"""Hold a model for a block or a run: one thread at a time, its adapters as the lens has them.

A model has one set of hooks and weights, so a block of one thread would change what the others compute. A
run of another thread is waited for; a block of another thread is an error.

    Running (run, record, generate, evaluate) ──┬─▶ a turn of this thread, adapters off where asked for
    blocks (intervene, record, paired) ─────────┘   Running alone: evaluation mode
"""

import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.adapters.attached import adapter_layers
from affectlens.checkpoints.memory import modules_of
from affectlens.errors import LensError
from affectlens.lens.hooks.recomputing import recomputes, refuse_late
from affectlens.lens.live import Live, answering, compiled, inner
from affectlens.lens.restoring import Swaps, atomic, interruptible, raise_waiting, refuse_copy


class Running:
    """Block in which a lens runs its model: in evaluation mode, and every mode is put back after it."""

    def __init__(self, live: Live) -> None:
        self._live, self._swaps = live, Swaps()

    @atomic
    def __enter__(self) -> None:
        self._swaps.open()
        try:
            model = self._live.model
            _take_turn(self._swaps, model, adapters_off=self._live.adapters_off, block=False)
            for module in modules_of(model):
                if module.training:
                    self._swaps.swap(module, "training", value=False)
            raise_waiting()
        except BaseException:
            self._swaps.undo()
            raise

    @atomic
    def __exit__(self, *_: object) -> None:
        self._swaps.undo()


@atomic
def hold(swaps: Swaps, model: nn.Module, *, adapters_off: bool) -> None:
    """Hold a model until the swaps are undone, and raise `LensError` in other threads that run it."""
    _take_turn(swaps, model, adapters_off=adapters_off, block=True)
    if adapters_off:
        refuse_late(swaps, model)
    part = inner(answering(model))
    for entrance in {part, getattr(part, "base_model", part)}:
        if not compiled(entrance):  # a compiled graph runs no hooks
            swaps.hook(entrance, _SameThread(entrance), side="enter")


def _take_turn(swaps: Swaps, model: nn.Module, *, adapters_off: bool, block: bool) -> None:
    turn = _Turn(inner(model), block=block, off=adapters_off)
    swaps.note(turn.end)
    turn.begin()
    if adapters_off:
        _switch_off(swaps, model)


def _switch_off(swaps: Swaps, model: nn.Module) -> None:
    """Switch all adapters off. Raises `LensError` where PEFT can't, without a change of weights."""
    for name, layer in adapter_layers(model):
        if getattr(layer, "merged_adapters", ()):
            merged = ", ".join(layer.merged_adapters)
            raise LensError(
                f"adapter {merged} is merged into the weights of {name}, so the model can't run without it. "
                f"Call unmerge_adapter() first"
            )
        if not layer.disable_adapters:
            swaps.swap(layer, "_disable_adapters", value=True)


@atomic
def switched_off(live: Live) -> Swaps:
    """Switch the adapters of a model off, for every lens on it, until the swaps are undone."""
    swaps = Swaps()
    swaps.open()
    try:
        if not live.adapters_off:
            raise LensError(
                "a lens is no block; use `with lens.intervene(…):` or `with lens.without_adapter():`"
            )
        hold(swaps, live.model, adapters_off=False)
        refuse_late(swaps, live.model)
        _switch_off(swaps, live.model)
        raise_waiting()
    except BaseException:
        swaps.undo()
        raise
    return swaps


def refuse_other_thread(live: Live) -> None:
    """Raise `LensError` while a block of another thread may have changed the model's weights."""
    held = _HOLDERS.get(inner(live.model))
    if held is not None and held.blocks and held.thread != threading.get_ident():
        raise LensError(_other_thread(live.model, held.name, threading.current_thread().name))


def looked_up(live: Live) -> Checkpoint:
    """Return the checkpoint of a lens's model with its adapters as the lens runs them."""
    if not live.adapters_off:
        _refuse_switched_off(_HOLDERS.get(inner(live.model)))
    if not live.adapters_off or live.known.pinned is not None:
        return live.known.checkpoint(live.model)
    with Running(live):
        return live.known.checkpoint(live.model)


@dataclass
class _Holder:
    """The thread that holds a model, with the number of its runs and blocks."""

    thread: int
    name: str
    runs: int = 0
    blocks: int = 0
    off: int = 0  # how many of them switched the adapters off


_HOLDERS: MutableMapping[nn.Module, _Holder] = WeakKeyDictionary()
_FREED = threading.Condition()


class _Turn:
    """A run or a block of one thread on one model."""

    def __init__(self, model: nn.Module, *, block: bool, off: bool) -> None:
        self._model, self._block, self._off, self._mine = model, block, off, False

    def begin(self) -> None:
        """Wait until no other thread runs the model; raise `LensError` if one is inside a block on it."""
        me = threading.current_thread()
        while True:
            with _FREED:
                held = _HOLDERS.setdefault(self._model, _Holder(threading.get_ident(), me.name))
                if held.thread == threading.get_ident():
                    if not self._off:
                        _refuse_switched_off(held)
                    self._count(held, 1)
                    return
                if held.blocks:
                    raise LensError(_other_thread(self._model, held.name, me.name))
            _wait()

    def end(self) -> None:
        """Give the model back, if it was taken."""
        with _FREED:
            held = _HOLDERS.get(self._model)
            if held is None or not self._mine:
                return
            self._count(held, -1)
            if not held.runs + held.blocks:
                del _HOLDERS[self._model]
                _FREED.notify_all()

    def _count(self, held: _Holder, more: int) -> None:
        held.blocks += more * self._block
        held.runs += more * (not self._block)
        held.off += more * self._off
        self._mine = more > 0


def _refuse_switched_off(held: _Holder | None) -> None:
    """Raise `LensError` where a block of a lens without adapters has switched off those of another lens."""
    if held is not None and held.off and held.thread == threading.get_ident():
        raise LensError(
            "a block of lens.without_adapter() has switched the adapters off, but this lens runs and reads "
            "the model with them. Use the lens without adapters inside the block; to transplant the adapted "
            "weights, open them before it: al.open_checkpoint(lens.model)"
        )


@interruptible
def _wait() -> None:
    with _FREED:
        _FREED.wait(0.05)


class _SameThread:
    """Hook at a model's entrance that raises `LensError` for passes that a block can't be right for.

    Those of other threads, and those through adapters that were attached or removed since.
    """

    def __init__(self, module: nn.Module) -> None:
        self._thread, self._name = threading.get_ident(), threading.current_thread().name
        self._adapters = _attached(module)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # On a GPU, a backward pass runs checkpointed parts again in a thread of its own.
        if threading.get_ident() != self._thread and not recomputes():
            raise LensError(_other_thread(module, self._name, threading.current_thread().name))
        if _attached(module) != self._adapters:
            raise LensError(
                "an adapter was attached or removed inside a block (intervene, record or paired), which its "
                "hooks and weights don't know. Do it before the block"
            )

    __reduce_ex__ = refuse_copy


def _attached(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that PEFT attached to a module, which it notes there."""
    return tuple(vars(module).get("peft_config") or ())


def _other_thread(model: nn.Module, holder: str, other: str) -> str:
    return (
        f"thread {holder!r} is inside a block (intervene, record or paired) on this {type(model).__name__}, "
        f"which would change what thread {other!r} computes. Enter the block in the thread that runs the "
        f"model, wait until the block ends, or give each thread a model of its own"
    )
