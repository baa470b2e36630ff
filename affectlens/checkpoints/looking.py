"""Look at a source without comparing or running it: lines for people, a tree, a record a tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affectlens.checkpoints.adapters import Adapter, is_adapter
from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.describing import describe
from affectlens.checkpoints.opening import Source, open_checkpoint
from affectlens.sites import drawn, nodes, record


@dataclass(frozen=True)
class Look:
    """What was found at a source: a checkpoint or an adapter."""

    checkpoint: Checkpoint | None
    adapter: Adapter | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Rows of (what, value)."""
        if self.adapter is not None:
            return self.adapter.lines()
        return describe(self._whole)

    def tree(self) -> Iterator[str]:
        """The sites by tower, stack and role, with parameters added up."""
        if self.adapter is not None:
            return drawn(nodes(self.adapter.sites))
        storage = self._whole.storage
        return drawn(nodes(self._whole.sites, lambda site: storage[site].size))

    def records(self) -> list[dict[str, Any]]:
        """One JSON-like record a stored tensor."""
        if self.adapter is not None:
            return self.adapter.records()
        headers = self._whole.store.headers
        return [record(t, laid, dtype=headers[t].dtype) for t, laid in self._whole.laid.items()]

    @property
    def _whole(self) -> Checkpoint:
        assert self.checkpoint is not None
        return self.checkpoint


def look(source: Source) -> Look:
    """Look at a folder, file, hub id, adapter folder or live module. Raises `CheckpointError`."""
    if isinstance(source, str | Path) and is_adapter(Path(source)):
        return Look(None, Adapter(Path(source)))
    return Look(open_checkpoint(source))
