"""Make a batch smaller until the memory holds it; the answers are the same."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from affectlens.errors import LensError
from affectlens.lens.telling import out_of_memory

Result = TypeVar("Result")


def fitting(run: Callable[[int], Result], size: int, *, what: str) -> tuple[Result, int]:
    """Run with a batch size, or with half of it as often as memory runs out; returns the size that fitted.

    Raises `LensError` where even one example is too much.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise LensError(
                    f"{what}: even one example at a time needs more memory than there is"
                ) from None
        # Only here, where the error and with it the frames of the failed run are gone.
        size //= 2
        _let_go()


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
