"""Store: the bytes of named tensors, whatever the format; and several stores joined."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from affectlens.checkpoints.bytes import Span
from affectlens.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # as torch names it, e.g. "bfloat16"


class Store(Protocol):
    """Named tensors somewhere: in safetensors files, in a live module, in a mapping."""

    name: str  # how a person would call it; never an absolute path
    source: str  # what opens it again: a path or hub id, empty for what is only in memory
    format: str
    headers: Mapping[str, Header]
    config: Mapping[str, Any]
    notes: tuple[str, ...]  # what was found beside the weights, in sentences

    @property
    def skipped(self) -> Mapping[str, tuple[str, int]]:
        """What is stored but not to be had: why, and its elements."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that are stored as another's bytes."""
        ...

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor, or some of its rows: as stored, or in float32 where that was packed."""
        ...

    def by_rows(self, tensor: str) -> bool:
        """Return whether some rows of a tensor can be read without the cost of all of them."""
        ...

    def span(self, tensor: str) -> Span | None:
        """Return where the values of a tensor are stored; None where they have to be computed or gathered."""
        ...

    def origin(self, tensor: str) -> Span | None:
        """Return where the opened files keep a tensor; `span` for all but edited tensors."""
        ...

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies the content: header hash, bytes, files, revision."""
        ...


class JoinedStore:
    """Serve each key from the store and the tensor that it stands for; `main` lends its name and facts."""

    def __init__(
        self,
        main: Store,
        parts: Mapping[str, tuple[Store, str]],
        *,
        config: Mapping[str, Any],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name, self.source, self.format = main.name, main.source, main.format
        self.config, self._main, self._parts = config, main, parts
        self._stores = list({id(store): store for store, _ in parts.values()}.values())
        self.headers: Mapping[str, Header] = {
            key: store.headers[name] for key, (store, name) in parts.items()
        }
        self.skipped: Mapping[str, tuple[str, int]] = {
            name: why for store in self._stores for name, why in store.skipped.items()
        }
        self.aliases: Mapping[str, str] = {}
        # Both parts of one file would tell of what else lies in it.
        found = dict.fromkeys(note for store in self._stores for note in store.notes)
        self.notes: tuple[str, ...] = (*notes, *found)

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor, or some of its rows."""
        store, name = self._parts[tensor]
        return store.read(name, rows)

    def by_rows(self, tensor: str) -> bool:
        """Return what its store says of a tensor."""
        store, name = self._parts[tensor]
        return store.by_rows(name)

    def span(self, tensor: str) -> Span | None:
        """Return where the bytes of a tensor are, if its store says so."""
        store, name = self._parts[tensor]
        return store.span(name)

    def origin(self, tensor: str) -> Span | None:
        """Return where the opened files keep a tensor, if its store says so."""
        store, name = self._parts[tensor]
        return store.origin(name)

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        for store in self._stores:
            store.check()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Those of the main store."""
        return self._main.facts


def together(first: Store, second: Store) -> JoinedStore:
    """Two stores that hold different tensors; raises `CheckpointError` for one that both hold."""
    for name in sorted(first.headers.keys() & second.headers.keys()):
        raise CheckpointError(second.source, f"also stored in {first.name}", key=name)
    parts = {name: (store, name) for store in (first, second) for name in store.headers}
    return JoinedStore(first, parts, config=first.config)
