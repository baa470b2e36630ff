"""How much memory is in use, and smaller batches where it runs out."""

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from affectlens.errors import LensError
from affectlens.lens.failures import out_of_memory

Result = TypeVar("Result")


def peak(device: torch.device | None = None) -> int:
    """Return the peak of memory in bytes, by default that of this process; 0 where no system reports it."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device is not None and device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def fitting(run: Callable[[int], Result], size: int, *, what: str) -> tuple[Result, int]:
    """Run with a batch size, halved each time memory runs out; return the result and the size that fitted.

    Raises `LensError` where even one example does not fit.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise LensError(f"{what}: not enough memory for even one example") from None
        # Outside `except`: the error keeps the frames of the failed run, and with them its tensors, alive.
        size //= 2
        _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
