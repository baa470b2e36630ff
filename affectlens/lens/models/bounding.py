"""A config that asks for more than the files hold is told at once, before memory or time is spent on it.

Settings are bounded twice: what is counted one by one when a config is read (layers, labels), by its
number; and all else by the parameters that the model comes to, counted while it is built without memory.
"""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules import module

from affectlens.checkpoints import Checkpoint
from affectlens.errors import LensError, quoted

_ONE_BY_ONE = re.compile(r"layer|depth|block|stage|label|expert|head|position|codebook|group", re.IGNORECASE)
# Other settings may be negative: a layer from the end, a token that is none, a window without a limit.
_COUNT = re.compile(
    r"(?:num|n)_(?:\w*_)?(?:layers?|heads?|experts|blocks|channels|labels|embd)|d_model|depths?|head_dim"
    r"|(?:\w*_)?(?:hidden|intermediate|vocab|patch)_size",
    re.IGNORECASE,
)
_FEW, _MANY = 10_000, 100_000_000  # what is made in no time; what a table of positions may have
_TIMES, _MORE = 4, 10_000_000  # a model may have tied and unsaved parameters beside those in its files
_BUFFERS = 2_000_000_000  # elements that a model works out for itself: masks, tables of positions


def refuse_unreasonable(checkpoint: Checkpoint) -> None:
    """Raise `LensError` for a config with more layers, or other things made one by one, than tensors.

    Nor can there be fewer than none of what is counted.
    """
    name, tensors = checkpoint.store.name, len(checkpoint.store.headers)
    for path, value in _numbers(checkpoint.config, ""):
        key = path.rpartition(".")[2]
        if _COUNT.fullmatch(key) and value < 0:
            raise LensError(
                f"{name}: config.json says {quoted(path)} = {value:,}, and less than none is no model"
            )
        most = _MANY if "position" in key.lower() else max(_FEW, tensors)
        if _ONE_BY_ONE.search(key) and value > most:
            raise LensError(
                f"{name}: config.json says {quoted(path)} = {value:,}, and the files hold {tensors:,} tensors"
            )


@contextmanager
def bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise `LensError` as soon as a model that is built in the block is much larger than its files."""
    most = {
        "parameters": _TIMES * checkpoint.parameters + _MORE,
        "buffers": _TIMES * checkpoint.parameters + _BUFFERS,
    }
    found = dict.fromkeys(most, 0)
    thread = threading.get_ident()

    def count(what: str, tensor: Tensor | None) -> None:
        # Without memory it is built, with memory it is loaded; that counts nothing twice.
        if tensor is None or not tensor.is_meta or threading.get_ident() != thread:
            return
        found[what] += tensor.numel()
        if found[what] > most[what]:
            path, value = max(_numbers(checkpoint.config, ""), key=lambda number: number[1], default=("", 0))
            largest = f"Its largest setting: {quoted(path)} = {value:,}"
            raise LensError(
                f"{checkpoint.store.name}: config.json asks for a model of more than {most[what]:,} {what}, "
                f"and the files hold {checkpoint.parameters:,} parameters. {largest}"
            )

    with ExitStack() as stack:
        for register, what in (
            (module.register_module_parameter_registration_hook, "parameters"),
            (module.register_module_buffer_registration_hook, "buffers"),
        ):
            handle = register(lambda _, __, tensor, what=what: count(what, tensor))
            stack.callback(handle.remove)
        yield


def _numbers(config: Any, path: str) -> Iterator[tuple[str, int]]:
    """Every whole number in a config, with its path."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for value in config[:1000]:
            yield from _numbers(value, path)
    elif type(config) is int:
        yield path, config
