"""The store over tensors in memory: a live module, or a mapping from names to tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from affectlens.checkpoints.checkpoint import Checkpoint, Header


class MemoryStore:
    """Serve tensors as they are; nothing is copied."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        name: str = "in memory",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.format, self.source = name, "memory", ""
        self._tensors = tensors
        self.config: Mapping[str, Any] = config or {}
        self.headers: Mapping[str, Header] = {
            key: Header(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for key, tensor in tensors.items()
        }

    def read(self, tensor: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, sharing its memory."""
        found = self._tensors[tensor].detach()
        return found if rows is None else found[rows]

    @property
    def facts(self) -> dict[str, Any]:
        """The size; a hash would cost a pass over the model."""
        return {"bytes": sum(t.numel() * t.element_size() for t in self._tensors.values())}


def from_module(module: nn.Module) -> Checkpoint:
    """See a live module as a checkpoint; tied parameters appear once."""
    config = getattr(module, "config", None)
    known = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    name = type(module).__name__
    return Checkpoint(MemoryStore(dict(module.named_parameters()), name=name, config=known))
