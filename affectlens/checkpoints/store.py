"""A store reads named tensors from anywhere: files of one format, a live module, or several stores joined."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from affectlens.checkpoints.bytes import Span
from affectlens.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class Header(NamedTuple):
    """The shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: str  # as torch names it, e.g. "bfloat16"


class Store(Protocol):
    """Named tensors from any source: what every reader of a checkpoint goes by.

    The stores are `SafetensorsStore`, `PickleStore` and `MemoryStore`; `QuantizedStore`, `JoinedStore` and
    the `EditedStore` of `affectlens.writing` stand over others.

    >>> import affectlens as al
    >>> store = al.load_demo().base.store
    >>> store.headers["language_model.model.layers.0.mlp.up_proj.weight"]
    Header(shape=(352, 128), dtype='bfloat16')
    """

    name: str  # for people; never an absolute path
    source: str  # the path or hub id that opens it again; empty for tensors that are only in memory
    format: str
    headers: Mapping[str, Header]
    config: Mapping[str, Any]
    notes: tuple[str, ...]  # sentences on what else was found with the weights

    @property
    def skipped(self) -> Mapping[str, tuple[str, int]]:
        """Stored tensors that can't be read: the reason, and the number of elements."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share the bytes of another name."""
        ...

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor, or some of its rows: as stored, or in float32 if it is stored packed."""
        ...

    def by_rows(self, tensor: str) -> bool:
        """Return whether some rows of a tensor can be read without reading all of them."""
        ...

    def span(self, tensor: str) -> Span | None:
        """Return where the values of a tensor are stored; None if they must be computed or gathered."""
        ...

    def origin(self, tensor: str) -> Span | None:
        """Return where the opened files store a tensor: its span, unless it has been edited."""
        ...

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts that identify the content: header hash, bytes, files, revision."""
        ...


class JoinedStore:
    """Serve each key from a tensor of one of several stores; name and facts are those of `main`."""

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
        # Stores over the same file repeat its notes; each is kept once.
        found = (note for store in (main, *self._stores) for note in store.notes)
        self.notes: tuple[str, ...] = tuple(dict.fromkeys((*notes, *found)))

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor, or some of its rows."""
        store, name = self._parts[tensor]
        return store.read(name, rows)

    def by_rows(self, tensor: str) -> bool:
        """Return whether its store can read some rows of a tensor alone."""
        store, name = self._parts[tensor]
        return store.by_rows(name)

    def span(self, tensor: str) -> Span | None:
        """Return where its store keeps the values of a tensor."""
        store, name = self._parts[tensor]
        return store.span(name)

    def origin(self, tensor: str) -> Span | None:
        """Return where the files of its store keep a tensor."""
        store, name = self._parts[tensor]
        return store.origin(name)

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        for store in self._stores:
            store.check()

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts of the main store."""
        return self._main.facts


def parts(store: Store) -> tuple[Store, ...]:
    """Return the stores that a store is joined from, at any depth; else the store itself."""
    if not isinstance(store, JoinedStore):
        return (store,)
    return tuple(inner for one in store._stores for inner in parts(one))


def together(first: Store, second: Store) -> JoinedStore:
    """Join two stores; raises `CheckpointError` for a tensor that both hold."""
    for name in sorted(first.headers.keys() & second.headers.keys()):
        raise CheckpointError(second.source, f"also stored in {first.name}", key=name)
    parts = {name: (store, name) for store in (first, second) for name in store.headers}
    return JoinedStore(first, parts, config=first.config)
