"""Read pickles as data: their instructions are followed here, but no function that they name is called.

    bytes ── Unpickler ──▶ numbers, text, tuples, lists, dicts, and the records of `rebuilding`

A pickle is a program for a stack machine. Python's reader runs it, and torch's restricted reader still calls
the functions on its list: encoding 100,000 letters as punycode takes hours, a tuple nested a million deep
kills the process, and an attribute named `items` replaces the method. Here a call to
`torch._utils._rebuild_tensor_v2` becomes a record of its arguments, and names without a record are refused.
"""

import struct
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any

from affectlens.checkpoints.pickles.rebuilding import (
    ALLOWED,
    PLAIN,
    Named,
    Odd,
    Settings,
    TorchStorage,
    called,
    refused,
    storage,
)
from affectlens.errors import CheckpointError, quoted

# A tensor takes 32 instructions and the largest models have 100,000 tensors; the limit takes two seconds.
_MOST = 5_000_000
_BYTE, _SHORT, _WORD, _SIGNED, _DOUBLE = map(struct.Struct, ("B", "<H", "<I", "<i", ">d"))
# The names in Python 2 of the modules that a torch file may name.
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Unpickler:
    """Read pickles one after the other from a stream; `storages` are those named so far."""

    def __init__(self, stream: BufferedIOBase, path: str) -> None:
        self.path, self.storages = path, dict[str, TorchStorage]()
        self._read, self._line = stream.read, stream.readline
        self._left = _MOST

    def load(self) -> Any:
        """Return the next object; raises `CheckpointError` if it is broken, refused or too long."""
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}
        try:
            return self._followed()
        except CheckpointError:
            raise
        except Exception as error:  # broken instructions can fail anywhere, but touch nothing outside
            reason = f"is broken, or not a torch file ({type(error).__name__})"
            raise CheckpointError(self.path, reason, fix="Download it again") from None

    def _followed(self) -> Any:
        read, steps = self._read, _STEPS
        for left in range(self._left - 1, -1, -1):
            self._left = left
            code = read(1)
            if code in steps:
                steps[code](self)
            elif code == b".":
                return self._stack.pop()
            elif code:
                raise refused(self.path, "")
            else:
                raise EOFError
        raise CheckpointError(self.path, f"its pickle has more than {_MOST:,} instructions")

    def _bytes(self, count: int) -> bytes:
        found = self._read(count)
        if len(found) < count:
            raise EOFError
        return found

    def _number(self, kind: struct.Struct) -> Any:
        return kind.unpack(self._read(kind.size))[0]

    def _text(self, kind: struct.Struct) -> str:
        # Invalid UTF-8 must not become a name that can't be printed.
        return self._bytes(self._number(kind)).decode("utf-8", "backslashreplace")

    def _global(self) -> Named:
        module, name = (self._line(1000).rstrip(b"\n").decode("utf-8") for _ in range(2))
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full not in ALLOWED:
            raise refused(self.path, full)
        return Named(full)

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        """Pop and return everything above the last mark."""
        found, self._stack = self._stack, self._below.pop()
        return found

    def _last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise EOFError
        found = self._stack[-count:]
        del self._stack[-count:]
        return found

    def _stored(self) -> TorchStorage:
        found = storage(self._stack.pop())
        if self.storages.setdefault(found.key, found).dtype != found.dtype:
            raise ValueError("one storage of two dtypes")
        return found

    def _put(self, kind: struct.Struct) -> None:
        self._memo[self._number(kind)] = self._stack[-1]

    def _call(self) -> None:
        function, arguments = self._last(2)
        if type(function) is not Named or type(arguments) is not tuple:
            raise refused(self.path, "")
        self._stack.append(called(function, arguments))

    def _build(self) -> None:
        state, instance = self._stack.pop(), self._stack[-1]
        if type(instance) is Settings:
            instance.attributes = state
        elif type(instance) is not dict:  # attributes of an OrderedDict, such as the versions of modules
            raise refused(self.path, "")

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError
        target += items

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) and key in target:
                raise CheckpointError(self.path, f"is broken: a dict has the key {quoted(key)} twice")
            # Hashing a very deeply nested tuple would kill the process.
            target[key if isinstance(key, PLAIN) else Odd(type(key).__name__)] = value


def _pushing(value: Callable[[Unpickler], object]) -> Callable[[Unpickler], None]:
    def step(self: Unpickler) -> None:
        found = value(self)  # may replace self._stack by the one below a mark
        self._stack.append(found)

    return step


_STEPS: dict[bytes, Callable[[Unpickler], None]] = {
    b"\x80": lambda self: self._number(_BYTE),  # the protocol
    **{
        code: _pushing(value)
        for code, value in {
            b"J": lambda self: self._number(_SIGNED),
            b"K": lambda self: self._number(_BYTE),
            b"M": lambda self: self._number(_SHORT),
            b"G": lambda self: self._number(_DOUBLE),
            b"\x8a": lambda self: int.from_bytes(self._bytes(self._number(_BYTE)), "little", signed=True),
            b"U": lambda self: self._text(_BYTE),
            b"X": lambda self: self._text(_WORD),
            b"h": lambda self: self._memo[self._number(_BYTE)],
            b"j": lambda self: self._memo[self._number(_WORD)],
            b"t": lambda self: tuple(self._marked()),
            b"\x85": lambda self: tuple(self._last(1)),
            b"\x86": lambda self: tuple(self._last(2)),
            b"\x87": lambda self: tuple(self._last(3)),
            b"c": Unpickler._global,
            b"Q": Unpickler._stored,
        }.items()
    },
    # Half of all instructions; `_pushing` would take twice as long.
    b"N": lambda self: self._stack.append(None),
    b"\x88": lambda self: self._stack.append(True),
    b"\x89": lambda self: self._stack.append(False),
    b")": lambda self: self._stack.append(()),
    b"]": lambda self: self._stack.append([]),
    b"}": lambda self: self._stack.append({}),
    b"(": Unpickler._mark,
    b"q": lambda self: self._put(_BYTE),
    b"r": lambda self: self._put(_WORD),
    b"R": Unpickler._call,
    b"\x81": Unpickler._call,
    b"b": Unpickler._build,
    b"a": lambda self: self._extend(self._last(1)),
    b"e": lambda self: self._extend(self._marked()),
    b"s": lambda self: self._update(self._last(2)),
    b"u": lambda self: self._update(self._marked()),
}
