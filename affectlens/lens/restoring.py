"""Set attributes and hooks for a while, and leave the very same objects behind, whatever arrives meanwhile.

A Ctrl-C can come between any two bytecodes, also between entering a block and its first line, or while the
last one is being undone. So while something is swapped, an interrupt that falls into this file waits until
the swap is whole; everywhere else, in the block above all, it is raised at once as always.
"""

import signal
import threading
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from types import CodeType, FrameType
from typing import Any, TypeVar

from torch import Tensor, nn

from affectlens.checkpoints.memory import HELD, Held
from affectlens.errors import LensError

F = TypeVar("F", bound=Callable[..., Any])

_TRIES = 3  # at undoing one thing
_ATOMIC: set[CodeType] = set()  # an interrupt waits for these
_OPEN: set[CodeType] = set()  # and not for these, though an atomic function called them
_waiting: list[int] = []  # signals that came and were not raised yet


def atomic(function: F) -> F:
    """Let an interrupt wait for this function, which calls `raise_waiting` when it is done."""
    _ATOMIC.add(unwrap(function).__code__)
    return function


def interruptible(function: F) -> F:
    """Let an interrupt through in this function, and in what it calls, also where an atomic one called it."""
    _OPEN.add(unwrap(function).__code__)
    return function


def raise_waiting() -> None:
    """Raise the interrupt that waited, if there is one."""
    if _waiting:
        _waiting.clear()
        raise KeyboardInterrupt


class Swaps:
    """What was set and hooked, and how to undo each; `undo` does so in reverse order."""

    def __init__(self) -> None:
        self._undoings: list[Callable[[], None]] = []
        self._shielded = self._opened = False

    @atomic
    def open(self) -> None:
        """Say that a block begins; raises `LensError` inside one: leaving it would end the outer one too."""
        if self._opened:
            raise LensError("this block is entered already; make another one to nest it")
        self._opened = True

    @atomic
    def swap(self, owner: Any, name: str, *, value: Any) -> None:
        """Set an attribute, and keep what it was."""
        before = getattr(owner, name)
        if name == "data" and isinstance(owner, Tensor):
            held = Held(before)
            self._note(partial(_release, owner, held))
            HELD.setdefault(owner, []).append(held)
        else:
            self._note(partial(setattr, owner, name, before))
        setattr(owner, name, value)

    @atomic
    def hook(self, module: nn.Module, function: Callable[..., Any], *, side: str) -> None:
        """Call a function with a module's input and keyword arguments, and after it with its output.

        `side` is `"output"`, `"input"`, or, before all hooks that are there already: `"enter"`, and
        `"weights"` for what is a part of the module itself.
        """
        self._note(partial(_unhook, module, function))
        if side in ("output", "weights"):
            module.register_forward_hook(function, with_kwargs=True, prepend=side == "weights")
            collect_last(module)
        else:
            module.register_forward_pre_hook(function, with_kwargs=True, prepend=side == "enter")

    def _note(self, undoing: Callable[[], None]) -> None:
        if not self._shielded:
            self._shielded = _shield()
        # Noted first: to undo what was never done does no harm.
        self._undoings.append(undoing)

    @atomic
    def undo(self) -> None:
        """Undo everything; what breaks in meanwhile is raised when all is done."""
        failure: BaseException | None = None
        tries = 0
        while self._undoings:
            try:
                self._undoings[-1]()
                tries = _TRIES
            except BaseException as error:  # of a signal handler of the user's, or of the owner
                failure, tries = error, tries + 1
            if tries >= _TRIES:
                self._undoings.pop()
                tries = 0
        self._opened = False
        if self._shielded:
            self._shielded = False
            _unshield()
        if failure is not None:
            raise failure
        raise_waiting()


def collect_last(module: nn.Module) -> None:
    """Let the hooks by which transformers collects hidden states, and leaves in place, see what others made.

    Some models go on with what is collected: LLaVA with a layer of its vision tower.
    """
    hooks = module._forward_hooks
    for number, one in list(hooks.items()):
        if getattr(one, "__module__", "").startswith("transformers."):
            hooks[number] = hooks.pop(number)


def _release(owner: Tensor, held: Held) -> None:
    """Give a parameter back what a block found; where another block was entered since, that one will."""
    blocks = HELD.get(owner, [])
    if held not in blocks:
        return
    at = blocks.index(held)
    if blocks[at + 1 :]:
        blocks[at + 1].before = held.before
    else:
        owner.data = held.before
    blocks.remove(held)
    if not blocks:
        HELD.pop(owner, None)


def _unhook(module: nn.Module, function: Callable[..., Any]) -> None:
    """Remove a function from a module's hooks, by itself: a handle might never have come back to us."""
    for hooks, others in (
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    ):
        for number in [number for number, one in hooks.items() if one is function]:
            del hooks[number]
            for other in others:
                other.pop(number, None)


def _shield() -> bool:
    """Take over Python's own answer to Ctrl-C; a handler of the user's, and other threads, are left alone."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, _interrupted)
    return True


def _unshield() -> None:
    """Give the answer to Ctrl-C back, if it is still ours to give."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or keep it for when what it fell into is done."""
    where = frame
    while where is not None and where.f_code not in _OPEN:
        if where.f_code in _ATOMIC:
            _waiting.append(number)
            return
        where = where.f_back
    signal.default_int_handler(number, frame)
