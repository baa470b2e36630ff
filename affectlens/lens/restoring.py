"""Set attributes and hooks for a block, and restore the very same objects, even after an interrupt.

A Ctrl-C can arrive between any two bytecodes: between entering a block and its first line, or while the last
swap is undone. So an interrupt that arrives inside an atomic function waits until that function is done.
Everywhere else, above all in the user's block, it is raised at once.
"""

import signal
import threading
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from types import CodeType, FrameType
from typing import NoReturn, TypeVar

from torch import Tensor, nn

from affectlens.checkpoints.memory import HELD, Held
from affectlens.errors import LensError

F = TypeVar("F", bound=Callable[..., object])

_TRIES = 3  # attempts to undo one swap
_ATOMIC: set[CodeType] = set()  # an interrupt waits for these functions
_OPEN: set[CodeType] = set()  # but not for these, even if an atomic function called them
_waiting: list[int] = []  # signals that arrived and are not raised yet


def atomic(function: F) -> F:
    """Make an interrupt wait for this function, which must call `raise_waiting` when it is done."""
    _ATOMIC.add(unwrap(function).__code__)
    return function


def interruptible(function: F) -> F:
    """Raise an interrupt at once in this function and its callees, even inside an atomic one."""
    _OPEN.add(unwrap(function).__code__)
    return function


def raise_waiting() -> None:
    """Raise the interrupt that is waiting, if any."""
    if _waiting:
        _waiting.clear()
        raise KeyboardInterrupt


class Swaps:
    """The attributes and hooks that a block has set; `undo` restores them in reverse order."""

    def __init__(self) -> None:
        self._undoings: list[Callable[[], None]] = []
        self._shielded = self._opened = False

    @atomic
    def open(self) -> None:
        """Begin a block. Raises `LensError` if it is active: leaving it twice would end the outer one too."""
        if self._opened:
            raise LensError("this block is already active; make a second one to nest it")
        self._opened = True

    @atomic
    def swap(self, owner: object, name: str, *, value: object) -> None:
        """Set an attribute, and keep its old value."""
        before = getattr(owner, name)
        if name == "data" and isinstance(owner, Tensor):
            # Blocks may be left in any order, so each swapped parameter keeps a list of them.
            held = Held(before)
            self.note(partial(_release, owner, held))
            HELD.setdefault(owner, []).append(held)
        else:
            self.note(partial(setattr, owner, name, before))
        setattr(owner, name, value)

    @atomic
    def run(self, doing: Callable[[], None], undoing: Callable[[], None]) -> None:
        """Call a function now, and another one to undo it; undoing what was not done must do no harm."""
        self.note(undoing)
        doing()

    @atomic
    def hook(self, module: nn.Module, function: Callable[..., object], *, side: str) -> None:
        """Register a function as a hook of a module.

        `side` is `"input"` or `"output"`, after the hooks that the module has already; or, before them,
        `"enter"` for the input and `"weights"` for the output, for a hook that is a part of the module.
        `"leave"` is after the output, and after an error.
        """
        self.note(partial(_unhook, module, function))
        if side in ("output", "weights"):
            module.register_forward_hook(function, with_kwargs=True, prepend=side == "weights")
            collect_last(module)
        elif side == "leave":
            module.register_forward_hook(function, with_kwargs=True, always_call=True)
        else:
            module.register_forward_pre_hook(function, with_kwargs=True, prepend=side == "enter")

    @atomic
    def note(self, undoing: Callable[[], None]) -> None:
        """Undo a change with this function; note it before the change is made."""
        if not self._shielded:
            self._shielded = _shield()
        # Noted before the change is made, because undoing a change that was never made does no harm.
        self._undoings.append(undoing)

    @atomic
    def undo(self) -> None:
        """Undo everything; raise an error or interrupt that arrives meanwhile at the end."""
        failure: BaseException | None = None
        tries = 0
        while self._undoings:
            try:
                self._undoings[-1]()
                tries = _TRIES
            except BaseException as error:  # from the user's signal handler, or from the owner's setter
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


def refuse_copy(owner: object, protocol: object) -> NoReturn:
    """Raise `LensError`: the `__reduce_ex__` of a hook, so that no copy of a model keeps it for good."""
    raise LensError(
        "the model is inside a block (intervene, record or paired), so a copy or a pickle of it would keep "
        "the block's weights and hooks. Copy or save it before the block or after it"
    )


def collect_last(module: nn.Module) -> None:
    """Move the hooks with which transformers collects hidden states behind all others.

    transformers leaves them in place, and some models compute with what they collect: LLaVA with a layer of
    its vision tower. Before our hooks, they would collect the values without the intervention.
    """
    hooks = module._forward_hooks
    for number, one in list(hooks.items()):
        if getattr(one, "__module__", "").startswith("transformers."):
            hooks[number] = hooks.pop(number)


def _release(owner: Tensor, held: Held) -> None:
    """Give a parameter back the tensor that a block found.

    If a later block holds the parameter too, it takes over that tensor and gives it back at its own end.
    """
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


def _unhook(module: nn.Module, function: Callable[..., object]) -> None:
    """Remove a function from a module's hooks.

    Searches for the function instead of using a handle: an interrupt may fall before the handle is returned.
    """
    for hooks, others in (
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    ):
        for number in [number for number, one in hooks.items() if one is function]:
            del hooks[number]
            for other in others:
                other.pop(number, None)


def _shield() -> bool:
    """Replace Python's default handler of Ctrl-C; return whether it was replaced.

    A handler of the user stays, and so does everything when this is not the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, _interrupted)
    return True


def _unshield() -> None:
    """Restore Python's default handler of Ctrl-C, unless the user has installed another one meanwhile."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or keep it until the atomic function that is running is done."""
    where = frame
    while where is not None and where.f_code not in _OPEN:
        if where.f_code in _ATOMIC:
            _waiting.append(number)
            return
        where = where.f_back
    signal.default_int_handler(number, frame)
