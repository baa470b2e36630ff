"""Run a model and its towers on inputs that they accept, and record what inner modules were called with.

No config says in one form which inputs a tower takes, so several are tried, those of the text model first. A
module that no input reaches has no call, and its claims stay unverified.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from affectlens.probes.made_up_inputs import guesses

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache", "cache_position")


class Call(NamedTuple):
    """The arguments that a module was called with, without caches."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def recorded(
    model: nn.Module, names: Sequence[str], *, batch: Mapping[str, Any] | None = None
) -> tuple[dict[str, Call], str]:
    """Run a model and its towers; return the calls of the named modules, and the last failure in words.

    With `batch`, run the model alone on it. The model's modes and the random numbers that come next stay.
    """
    calls: dict[str, Call] = {}
    failure = ""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # In a forked generator: a check must not change the random numbers that the user draws next.
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _recording(model, names, calls):
            torch.manual_seed(0)
            for prefix, tower in _towers(model):
                below = [n for n in names if n.startswith(prefix)]
                for guess in [dict(batch)] if batch is not None else guesses(tower):
                    if all(name in calls for name in below):
                        break
                    try:
                        tower(**guess)
                    except Exception as problem:  # a model may raise anything on made-up input
                        failure = f"{type(tower).__name__}: {type(problem).__name__}: {problem}"[:200]
                if batch is not None:
                    break
    finally:
        for module in was_training:
            module.training = True
    return calls, failure


@contextmanager
def _recording(model: nn.Module, names: Sequence[str], calls: dict[str, Call]) -> Iterator[None]:
    modules = dict(model.named_modules())
    handles = []

    try:
        for name in names:
            handles.append(
                modules[name].register_forward_pre_hook(partial(_keep, calls, name), with_kwargs=True)
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    calls: dict[str, Call], name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    call = Call(*_cut_off((args, kwargs)))
    # The first call, unless it has fewer than three tokens: a probe needs tokens beside the changed one.
    if name not in calls or _length(calls[name]) < 3 <= _length(call):
        calls[name] = call


def _length(call: Call) -> int:
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor) and x.ndim >= 2]
    return max(tensors[0].shape[:-1]) if tensors else 0


def _cut_off(value: Any) -> Any:
    """Copy nested inputs without gradients, and without caches, which a replay would fill a second time."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _without_cache(k, v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cut_off(one) for one in value)
    return None if "Cache" in type(value).__name__ else value


def _without_cache(key: str, value: Any) -> Any:
    if key in _CACHES:
        return None
    return False if key == "use_cache" else _cut_off(value)


def _towers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model, then each part of it that takes an input of its own, with the prefix of its names."""
    yield "", model
    for name, module in model.named_modules():
        if name and hasattr(module, "main_input_name") and hasattr(module, "config"):
            yield f"{name}.", module
