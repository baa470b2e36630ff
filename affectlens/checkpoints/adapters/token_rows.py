"""Rows of single tokens that an adapter trained: an embedding in which they take the place of base's rows.

PEFT's `trainable_token_indices` saves the new rows themselves; their numbers are in the adapter's config.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.store import Header, Store
from affectlens.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class TokenRowsStore:
    """Show an embedding of `base` with the rows `numbers` replaced by those of a tensor of `rows`."""

    def __init__(
        self, base: tuple[Store, str], rows: tuple[Store, str], *, numbers: tuple[int, ...], owner: str
    ) -> None:
        (self._base, self._tensor), (self._rows, self._new) = base, rows
        self.name, self.source, self.format = self._rows.name, self._rows.source, self._rows.format
        self.config = self._rows.config
        self.notes: tuple[str, ...] = ()
        self.skipped: Mapping[str, tuple[str, int]] = {}
        self.aliases: Mapping[str, str] = {}
        self._at = {number: row for row, number in enumerate(numbers)}
        header, new = self._base.headers[self._tensor], self._rows.headers[self._new]
        self.headers: Mapping[str, Header] = {owner: header}
        if new.shape != (len(numbers), *header.shape[1:]):
            reason = f"rows of shape {new.shape} for {len(numbers)} tokens of an embedding of {header.shape}"
            raise CheckpointError(self.name, reason, key=self._new)
        if len(self._at) < len(numbers) or not all(0 <= number < header.shape[0] for number in numbers):
            reason = f"token numbers must differ and be below {header.shape[0]:,}, the rows of the embedding"
            raise CheckpointError(self.name, reason, key=self._new)

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return the embedding, or some of its rows, in base's dtype as PEFT merges it."""
        found = self._base.read(self._tensor, rows).clone()
        first, last, _ = (rows or slice(None)).indices(self.headers[tensor].shape[0])
        new = self._rows.read(self._new)
        for number, row in self._at.items():
            if first <= number < last:
                found[number - first] = new[row].to(found)
        return found

    def by_rows(self, tensor: str) -> bool:
        """Return whether some rows can be read alone, as base can."""
        return self._base.by_rows(self._tensor)

    def span(self, tensor: str) -> Span | None:
        """Return None: the values lie in two files."""
        return None

    def origin(self, tensor: str) -> Span | None:
        """Return None: the values lie in two files."""
        return None

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        self._base.check()
        self._rows.check()

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts of the adapter."""
        return self._rows.facts


def token_numbers(stated: object, module: str) -> tuple[int, ...] | None:
    """Return the tokens that a config lists for a module; None if it lists none.

    `stated` is a list for the input embedding, or a mapping from the last parts of module names to lists.

    >>> token_numbers({"embed_tokens": [5, 9]}, "model.embed_tokens")
    (5, 9)
    """
    if isinstance(stated, Mapping):
        ends = (f".{module}".endswith(f".{name}") for name in stated)
        stated = next((listed for (_, listed), fits in zip(stated.items(), ends, strict=True) if fits), None)
    if not isinstance(stated, list) or not all(type(number) is int for number in stated):
        return None
    return tuple(stated)
