"""Look at a source without comparing or running it: lines for people, a tree, a record a tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affectlens.checkpoints.adapters.adapter import Adapter
from affectlens.checkpoints.adapters.factors import FACTOR
from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.describing import describe
from affectlens.checkpoints.opening import Source, open_checkpoint, stored
from affectlens.checkpoints.quantized import unpacked
from affectlens.sites import Site, drawn, nodes, record


@dataclass(frozen=True)
class Look:
    """What was found at a source."""

    source: Checkpoint | Adapter

    def lines(self) -> list[tuple[str, str]]:
        """Rows of (what, value)."""
        return self.source.lines() if isinstance(self.source, Adapter) else describe(self.source)

    def tree(self) -> Iterator[str]:
        """The sites by tower, stack and role; a checkpoint's with their parameters added up."""
        size: Callable[[Site], int] | None = None
        if isinstance(self.source, Checkpoint):
            storage = self.source.storage
            size = lambda site: storage[site].size  # noqa: E731  as short as what it says
        return drawn(nodes(self.source.sites, size))

    def records(self) -> list[dict[str, Any]]:
        """One JSON-like record a stored tensor."""
        if isinstance(self.source, Adapter):
            return self.source.records()
        headers = self.source.store.headers
        return [record(t, laid, dtype=headers[t].dtype) for t, laid in self.source.laid.items()]


def look(source: Source) -> Look:
    """Look at a folder, file, hub id, adapter or live module. Raises `CheckpointError`."""
    if isinstance(source, str | Path):
        store, config = stored(source)
        store = unpacked(store)
        if config or any(FACTOR.search(name) for name in store.headers):
            return Look(Adapter(store, config))
        return Look(Checkpoint(store))
    return Look(open_checkpoint(source))
