"""The store over tensors in memory: those of a live module, or a mapping from names to tensors."""

import math
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.store import Header
from affectlens.errors import CheckpointError


@dataclass(eq=False)
class Held:
    """The values that a parameter had before a block of interventions changed it."""

    before: Tensor


# For each parameter that is changed now, the blocks that changed it, outermost first.
HELD: MutableMapping[Tensor, list[Held]] = WeakIdKeyDictionary()


class TensorBytes:
    """The bytes of a contiguous CPU tensor, as a view of its memory."""

    remote = False

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.name = name
        self._view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
        self.size = len(self._view)
        # The address identifies the content only as long as nobody writes to it; see `check`.
        self.key: Hashable = ("memory", tensor.data_ptr(), self.size)

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """Return a view; nothing is copied."""
        return self._view[start:stop]

    def check(self) -> None:
        """Do nothing: the caller must not change tensors while they are read."""


class MemoryStore:
    """Serve tensors as they are; nothing is copied."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        name: str = "in memory",
        config: Mapping[str, Any] | None = None,
        elsewhere: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        self.name, self.format, self.source = name, "memory", ""
        self._tensors = tensors
        self._elsewhere = elsewhere or {}  # fetch the values of tensors that are offloaded
        self.untouched = False  # True: read the values from before the interventions that are active now
        self.config: Mapping[str, Any] = config or {}
        self.skipped: Mapping[str, tuple[str, int]] = {}
        self.aliases: Mapping[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self.headers: Mapping[str, Header] = {
            key: Header(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for key, tensor in tensors.items()
        }

    def before(self) -> "MemoryStore":
        """Return a store of the same tensors that reads their values from before any interventions."""
        found = copy(self)
        found.untouched = True
        return found

    def shares(self, other: object) -> bool:
        """Return whether another store serves any of the same tensor objects."""
        if not isinstance(other, MemoryStore):
            return False
        return any(self._tensors[name] is other._tensors.get(name) for name in self.headers)

    def read(self, tensor: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, without a copy; an offloaded one is fetched."""
        found = self._tensors[tensor].detach()
        if self.untouched and self._tensors[tensor] in HELD:
            found = HELD[self._tensors[tensor]][0].before
        if found.is_meta and tensor in self._elsewhere:
            found = self._elsewhere[tensor]().detach()
        if found.is_meta:
            fix = "Load the model without offloading, or name its files"
            raise CheckpointError(
                self.name, "is offloaded: its values are not in memory", key=tensor, fix=fix
            )
        return found if rows is None else found[rows]

    def by_rows(self, tensor: str) -> bool:
        """Return whether a tensor has rows; each can be read alone."""
        return bool(self.headers[tensor].shape)

    def span(self, tensor: str) -> Span | None:
        """Return where the bytes of a tensor are; None off the CPU, or if they are not one run."""
        found = self._tensors[tensor].detach()
        # The values from before are in another tensor, and perhaps on another device.
        if self.untouched and self._tensors[tensor] in HELD:
            return None
        if found.device.type != "cpu" or not found.is_contiguous() or not found.numel():
            return None
        data = TensorBytes(found, tensor)
        return Span(data, 0, data.size)

    def origin(self, tensor: str) -> Span | None:
        """Return the span: this store has no edits."""
        return self.span(tensor)

    def check(self) -> None:
        """Do nothing: the caller must not change tensors while they are read."""

    @property
    def facts(self) -> dict[str, int]:
        """The size in bytes; a hash would cost a pass over the model."""
        return {"bytes": sum(t.numel() * t.element_size() for t in self._tensors.values())}


def store_of(module: nn.Module) -> MemoryStore:
    """Return a store over a live module's parameters and persistent buffers; tied ones appear once.

    Raises `CheckpointError` for parameters on the meta device, unless accelerate offloaded them.
    """
    elsewhere, saved = _offloaded(module), saved_tensors(module)
    for name, tensor in saved.items():
        if tensor.is_meta and name not in elsewhere and isinstance(tensor, nn.Parameter):
            fix = "Load the weights first, or name their folder"
            raise CheckpointError(type(module).__name__, "is on the meta device", key=name, fix=fix)
    config = getattr(module, "config", None)
    known = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    # accelerate replaces each tied parameter by a placeholder of its own, so they no longer look tied.
    tied = {name for name in getattr(module, "all_tied_weights_keys", None) or {} if name in elsewhere}
    tensors = {name: tensor for name, tensor in saved.items() if name not in tied}
    return MemoryStore(tensors, name=type(module).__name__, config=known, elsewhere=elsewhere)


def _offloaded(module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return a function to fetch each parameter that accelerate offloaded to memory or disk."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,) if hook is not None else ()):
            kept = getattr(one, "weights_map", None)
            for own, parameter in part.named_parameters(recurse=getattr(one, "place_submodules", False)):
                if kept is not None and parameter.is_meta:
                    found[f"{name}.{own}".removeprefix(".")] = partial(kept.__getitem__, own)
    return found


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module, then its persistent buffers: the tensors that a save writes."""
    # Buffers that are not persistent are computed again on loading, so no file has them.
    kept = {
        f"{name}.{buffer}".removeprefix("."): tensor
        for name, part in module.named_modules()
        for buffer, tensor in part._buffers.items()
        if tensor is not None and buffer not in part._non_persistent_buffers_set
    }
    return {**dict(module.named_parameters()), **kept}


def peft_config(module: nn.Module) -> dict[str, Any]:
    """Return the config of a live module's adapter; empty if it has none.

    Raises `CheckpointError` if the adapter is merged while still attached, disabled or rescaled.
    """
    known = getattr(module, "peft_config", None)
    if not isinstance(known, Mapping) or len(known) != 1:
        return {}
    if any(getattr(part, "merged", False) is True for part in module.modules()):
        fix = "Call unmerge_adapter() or merge_and_unload()"
        raise CheckpointError(
            type(module).__name__,
            "its adapter is merged and still attached, so it would count twice",
            fix=fix,
        )
    ((adapter, config),) = known.items()
    for part in module.modules():
        scales = getattr(part, "scaling", None)
        if getattr(part, "disable_adapters", False) is True or _rescaled(part, scales, adapter):
            fix = "Enable it, and reset its scale; or save it and name the folder"
            raise CheckpointError(type(module).__name__, "its adapter is disabled or rescaled", fix=fix)
    found: dict[str, Any] = config.to_dict()
    return found


def _rescaled(part: nn.Module, scales: object, adapter: str) -> bool:
    if not isinstance(scales, Mapping) or adapter not in scales:
        return False
    rank, alpha = (getattr(part, name, {}).get(adapter) for name in ("r", "lora_alpha"))
    if not rank or alpha is None:
        return False
    # PEFT sets alpha/r, or alpha/√r for rsLoRA; any other scale was set by hand.
    return all(abs(scales[adapter] - alpha / r) > 1e-6 * abs(alpha) for r in (rank, math.sqrt(rank)))


def from_module(module: nn.Module) -> Checkpoint:
    """Return a live module without adapters as a checkpoint."""
    return Checkpoint(store_of(module))
