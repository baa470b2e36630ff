"""What a lens knows of its model, looked up again when the model has changed since.

Modules and parameters may be replaced, and adapters added, switched, rescaled or merged, at any time. A walk
over the modules tells, in less time than a layer takes to run; opening the checkpoint again takes longer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.checkpoints.adapters.attached import adapter_state, is_adapter_layer
from affectlens.checkpoints.memory import modules_of, saved_tensors

State = tuple[object, ...]
_MOST = 4  # states of the adapters whose checkpoints are kept, e.g. on and off in turn


class Current:
    """The parameters of a model, and its checkpoint in the last few states of its adapters."""

    def __init__(self) -> None:
        self._tensors: State = ()
        # Holds the tensors, so that the id of a replaced one is not used again.
        self._parameters: Mapping[str, Tensor] = {}
        self._checkpoints: dict[State, Checkpoint] = {}
        self.pinned: State | None = None

    def __reduce__(self) -> "tuple[type[Current], tuple[()]]":
        # A copy belongs to a copy of the model, which has other tensors.
        return Current, ()

    def parameters(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the parameters and persistent buffers by name, as they are now."""
        self._look(model)
        return self._parameters

    def checkpoint(self, model: nn.Module) -> Checkpoint:
        """Return the checkpoint of the model as it is now."""
        state = self._look(model)
        found = self._checkpoints.pop(state, None) or open_checkpoint(model)
        self._checkpoints[state] = found  # the last one that was used is the last
        while len(self._checkpoints) > _MOST:
            del self._checkpoints[next(iter(self._checkpoints))]
        return found

    def state(self, model: nn.Module) -> State:
        """Return what tells whether the model is the one it was, in values that can be compared."""
        adapters = self._look(model)
        return (self._tensors, adapters)

    @contextmanager
    def pinning(self, model: nn.Module) -> Iterator[None]:
        """Look once for a whole block, in which the model stays as it is."""
        before, self.pinned = self.pinned, self._look(model)
        try:
            yield
        finally:
            self.pinned = before

    def _look(self, model: nn.Module) -> State:
        if self.pinned is not None:
            return self.pinned
        tensors, adapters = state_of(model)
        if tensors != self._tensors or not self._parameters:
            self._parameters, self._checkpoints = saved_tensors(model), {}
            self._tensors = tensors
        return adapters


def state_of(model: nn.Module) -> tuple[State, State]:
    """Return what tells whether tensors were replaced, and which adapters count, in comparable values."""
    tensors: list[object] = []
    adapters: list[object] = []
    for module in modules_of(model):
        known = vars(module)
        for tensor in known["_parameters"].values():
            if tensor is not None:
                tensors += (id(tensor), tensor.dtype)
        for name, buffer in known["_buffers"].items():
            if buffer is not None and name not in known["_non_persistent_buffers_set"]:
                tensors += (id(buffer), buffer.dtype)
        if is_adapter_layer(module):
            adapters.append(adapter_state(module))
    return tuple(tensors), tuple(adapters)
