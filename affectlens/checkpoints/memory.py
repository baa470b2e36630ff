"""The store over tensors in memory: those of a live module, or a mapping from names to tensors."""

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
from affectlens.checkpoints.store import Header, Store, parts
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
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.name, self.format, self.source = name, "memory", ""
        self.tensors = tensors
        self._elsewhere = elsewhere or {}  # fetch the values of tensors that are offloaded
        self._shapes = shapes or {}  # of matrices that are stored packed
        self.unclear: Mapping[str, str] = {}  # tensors with which the model doesn't compute as they are: why
        # The layer of PEFT around a tensor, and which of its adapters were merged when this was opened.
        self.merged: Mapping[str, tuple[nn.Module, tuple[str, ...]]] = {}
        self.untouched = False  # True: read the values from before the interventions that are active now
        self.config: Mapping[str, Any] = config or {}
        self.skipped: Mapping[str, tuple[str, int]] = {}
        self.aliases: Mapping[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self.headers: Mapping[str, Header] = {
            key: Header(self._shapes.get(key, tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."))
            for key, tensor in tensors.items()
        }

    def before(self) -> "MemoryStore":
        """Return a store of the same tensors that reads their values from before any interventions."""
        found = copy(self)
        found.untouched = True
        return found

    def of(
        self, tensors: Mapping[str, Tensor], elsewhere: Mapping[str, Callable[[], Tensor]] | None = None
    ) -> "MemoryStore":
        """Return a store of other tensors of the same model; `elsewhere` fetches those that are on meta."""
        known = {**self._elsewhere, **(elsewhere or {})}
        found = MemoryStore(tensors, name=self.name, config=self.config, elsewhere=known, shapes=self._shapes)
        found.untouched, found.unclear, found.merged = self.untouched, self.unclear, self.merged
        return found

    def read(self, tensor: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, without a copy; an offloaded one is fetched.

        Raises `CheckpointError` for a tensor with which the model doesn't compute as it is.
        """
        self._refuse_unclear(tensor)
        found = value_of(self.tensors[tensor], untouched=self.untouched)
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
        self._refuse_unclear(tensor)
        found = self.tensors[tensor].detach()
        # The values from before are in another tensor, and perhaps on another device.
        if self.untouched and self.tensors[tensor] in HELD:
            return None
        if found.device.type != "cpu" or not found.is_contiguous() or not found.numel():
            return None
        data = TensorBytes(found, tensor)
        return Span(data, 0, data.size)

    def origin(self, tensor: str) -> Span | None:
        """Return the span: this store has no edits."""
        return self.span(tensor)

    def _refuse_unclear(self, tensor: str) -> None:
        if tensor in self.unclear:
            raise CheckpointError(self.name, self.unclear[tensor])
        layer, merged = self.merged.get(tensor, (None, ()))
        if tuple(vars(layer).get("merged_adapters", ()) if layer else ()) != merged:
            reason = "its adapters were merged or unmerged since it was opened"
            raise CheckpointError(self.name, reason, key=tensor, fix="Open it again")

    def check(self) -> None:
        """Do nothing: the caller must not change tensors while they are read."""

    @property
    def facts(self) -> dict[str, int]:
        """The size in bytes; a hash would cost a pass over the model."""
        return {"bytes": sum(t.numel() * t.element_size() for t in self.tensors.values())}


def value_of(tensor: Tensor, *, untouched: bool) -> Tensor:
    """Return the values of a tensor, if `untouched` those from before the interventions that are active."""
    return HELD[tensor][0].before if untouched and tensor in HELD else tensor.detach()


def shared(store: Store, other: Store) -> bool:
    """Return whether two stores serve any of the same tensor objects."""
    ours, theirs = (
        {id(tensor) for one in parts(each) if isinstance(one, MemoryStore) for tensor in one.tensors.values()}
        for each in (store, other)
    )
    return not ours.isdisjoint(theirs)


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
    found = MemoryStore(
        tensors, name=type(module).__name__, config=known, elsewhere=elsewhere, shapes=_packed(module)
    )
    found.unclear = {
        name: f"{name} is quantised ({tensor.dtype}), so its values can't be read. Load the model unquantised"
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter) and (tensor.itemsize < 2 or not tensor.is_floating_point())
    }
    return found


def _packed(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes (out, in) of matrices that are stored in another shape, as 4-bit ones are."""
    found: dict[str, tuple[int, ...]] = {}
    for name, part in module.named_modules():
        weight, known = part._parameters.get("weight"), vars(part)
        rows, columns = known.get("out_features"), known.get("in_features")
        if weight is None or weight.is_floating_point() or type(rows) is not int or type(columns) is not int:
            continue
        if weight.shape != (rows, columns):
            found[f"{name}.weight".removeprefix(".")] = (rows, columns)
    return found


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


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Return a module and all modules in it, each once; several times faster than `module.modules()`."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    left: list[nn.Module | None] = [module]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            found.append(one)
            left.extend(one._modules.values())
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


def from_module(module: nn.Module) -> Checkpoint:
    """Return a live module without adapters as a checkpoint."""
    return Checkpoint(store_of(module))
