"""Bench: a copy of one small module and a recorded call, to run again and again with a weight changed.

The model itself is never touched. The copy is in float32, so that the curve of an activation stands out from
rounding in a bfloat16 model too.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from affectlens.checkpoints.slicing import rows, take
from affectlens.probes.calls import Call
from affectlens.sites import Storage

Change = Callable[[Tensor], None]  # in place


class Unprobed(Exception):
    """A probe can't decide, for the reason given; the claim stays unverified."""


class Bench:
    """A float32 copy of the module `name` of a model, and the call that `run` replays."""

    def __init__(self, name: str, module: nn.Module, *, call: Call) -> None:
        if any(p.device.type == "meta" for p in module.parameters()):
            raise Unprobed("its weights are offloaded")
        self.name = name
        self.module = copy.deepcopy(module).float().eval()
        self.call = Call(*_float((call.args, call.kwargs)))
        self.modules = dict(self.module.named_modules(remove_duplicate=False))
        self.tensors = dict(self.module.named_parameters(remove_duplicate=False))
        self.recurs = any(name.endswith(("A_log", "dt_bias")) for name in self.tensors)
        self.mixes = _still(self.module)

    def below(self, name: str) -> str:
        """Return a name of the model relative to the module; raise `Unprobed` for one outside."""
        if self.name and name != self.name and not name.startswith(f"{self.name}."):
            raise Unprobed(f"{name} is outside {self.name}")
        return name[len(self.name) :].removeprefix(".") if self.name else name

    def tensor(self, where: Storage) -> Tensor:
        """Return the copy of a stored tensor."""
        try:
            return self.tensors[self.below(where.tensor)].data
        except KeyError:
            raise Unprobed(f"{where.tensor} is not a parameter of {self.name}") from None

    def values(self, where: Storage) -> Tensor:
        """Return the values of a site."""
        stored = self.tensor(where)
        some = rows(where)
        return take(stored if some is None else stored[some], where)

    def owner(self, where: Storage) -> str:
        """Return the module that holds a tensor, relative to this one."""
        return owner(self.below(where.tensor))

    @torch.no_grad()
    def run(
        self, watch: str | None = None, *, side: str = "input", edit: tuple[str, Change] | None = None
    ) -> Tensor:
        """Run the module; return its output, or what goes into or comes out of the inner module `watch`.

        `edit` is the name of an inner module and a function that changes its output in place. Raises
        `Unprobed` where the module does not run alone.
        """
        seen: list[Tensor] = []
        handles = []
        try:
            if edit is not None:
                handles.append(self.modules[edit[0]].register_forward_hook(partial(_change, edit[1])))
            if watch is not None and side == "input":
                handles.append(
                    self.modules[watch].register_forward_pre_hook(partial(_look_in, seen), with_kwargs=True)
                )
            elif watch is not None:
                handles.append(self.modules[watch].register_forward_hook(partial(_look_out, seen)))
            # Cloned each time, since some modules write into their arguments.
            output = self.module(*_float(self.call.args), **_float(self.call.kwargs))
        except Unprobed:
            raise
        except Exception as problem:
            raise Unprobed(
                f"{self.name} does not run alone: {type(problem).__name__}: {problem}"[:200]
            ) from None
        finally:
            for handle in handles:
                handle.remove()
        if watch is None:
            return _tensor(output)
        if not seen:
            raise Unprobed(f"{watch} is not called")
        return seen[0]

    @torch.no_grad()
    def order(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the innermost modules in the order of their calls, each with its input's shape."""
        found: list[tuple[str, tuple[int, ...]]] = []
        handles = []
        try:
            for name, module in self.modules.items():
                if name and not any(True for _ in module.children()):
                    handles.append(
                        module.register_forward_pre_hook(partial(_note, found, name), with_kwargs=True)
                    )
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextmanager
    def scaled(self, rows: Sequence[Tensor], factor: float) -> Iterator[None]:
        """Scale views of the copy's weights for the length of a block."""
        before = [row.clone() for row in rows]
        try:
            for row in rows:
                row.mul_(factor)
            yield
        finally:
            for row, values in zip(rows, before, strict=True):
                row.copy_(values)

    def row(self, where: Storage, unit: int) -> list[Tensor]:
        """Return views of a unit's row of a site, and of its bias if there is one."""
        stored = self.tensor(where)
        index, dim = place(where, unit)
        found = [_narrowed(stored, where, dim).select(dim, index)]
        name = self.below(where.tensor)
        for other in (name.removesuffix("weight") + "bias", f"{name}_bias"):
            bias = self.tensors.get(other) if other != name else None
            if bias is not None:
                own = bias.data if where.expert is None or bias.ndim == 1 else bias.data[where.expert]
                if own.ndim == 1 and index < own.shape[0]:
                    found.append(own[index : index + 1])
        return found

    def column(self, where: Storage, unit: int) -> list[Tensor]:
        """Return the view of a unit's column of a site."""
        stored = self.tensor(where)
        stored = stored if where.expert is None else stored[where.expert]
        return [stored.select(stored.ndim - 2 if where.transposed else 1, unit)]


def owner(tensor: str) -> str:
    """Return the module that a parameter belongs to."""
    module = tensor.rpartition(".")[0]
    return module.removesuffix(".parametrizations.weight")


def place(where: Storage, unit: int) -> tuple[int, int]:
    """Return the index and dimension of a site's row in the stored tensor (of its expert)."""
    ndim = len(where.shape)
    dim = ndim - 1 if where.transposed else 0
    cut = where.cut
    if cut is None or cut.dim - (where.expert is not None) != dim:
        return unit, dim
    part = cut.stop - cut.start
    return unit // part * (cut.period or 0) + cut.start + unit % part, dim


def _look_in(seen: list[Tensor], _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    seen.append(_tensor((*args, *kwargs.values())).clone())


def _look_out(seen: list[Tensor], _: nn.Module, args: object, output: object) -> None:
    seen.append(_tensor(output).clone())


def _change(edit: Change, _: nn.Module, args: object, output: object) -> None:
    edit(_tensor(output))


def _note(
    found: list[tuple[str, tuple[int, ...]]],
    name: str,
    _: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    found.append((name, tuple(tensors[0].shape) if tensors else ()))


def _narrowed(stored: Tensor, where: Storage, dim: int) -> Tensor:
    own = stored if where.expert is None else stored[where.expert]
    cut = where.cut
    across = None if cut is None else cut.dim - (where.expert is not None)
    if cut is not None and across is not None and across != dim and cut.period is None:
        return own.narrow(across, cut.start, cut.stop - cut.start)
    return own


def _tensor(value: object) -> Tensor:
    """Return the first floating-point tensor of a module's input or output; raise `Unprobed` without one."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for one in value:
            if isinstance(one, Tensor) and one.is_floating_point():
                return one
    raise Unprobed("it passes no floating-point tensor")


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype != torch.float32 else value.clone()
    if isinstance(value, dict):
        return {key: _float(one) for key, one in value.items()}
    return type(value)(_float(one) for one in value) if type(value) in (tuple, list) else value


def _still(module: nn.Module) -> bool:
    """Let causal convolutions over time pass each token unchanged; return whether other ones mix tokens.

    Else the probe of an attention would take the convolution's mixing of tokens for attention.
    """
    left = False
    for inner in module.modules():
        if isinstance(inner, nn.Conv1d) and inner.groups == inner.in_channels == inner.out_channels:
            # The last tap of a causal convolution sees the token itself.
            causal = inner.padding[0] == inner.kernel_size[0] - 1
            if inner.kernel_size[0] > 1 and causal:
                inner.weight.data.zero_()
                inner.weight.data[..., -1] = 1
                continue
        if isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            # A Conv1d that sees single tokens mixes none, but lays channels and heads out differently.
            left |= any(size > 1 for size in inner.kernel_size) or isinstance(inner, nn.Conv1d)
    return left
