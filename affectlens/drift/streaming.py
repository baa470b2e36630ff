"""Run the parts of a diff: in the order of the disk, over threads, told in bytes, and stopped at once.

Each thread has buffers of its own, so memory is bounded by them and not by tensors or checkpoints. Sums
of parts are merged in their order, whichever thread was first.
"""

import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from affectlens.drift.planning import Part, Strip, parts
from affectlens.drift.sums import Sums

_MOST = 8  # threads: beyond it memory is the limit, not the cores
_FAR = 4  # where a hub is read: they wait for it more than they work
Tell = Callable[[int], Any]  # takes a number of bytes
Show = Callable[[Sequence[Any], str], Iterable[Any]]  # goes over things, under a bar that counts them


def engine() -> Any:
    """Return the compiled engine, or torch's where numba or what it needs of the processor is missing."""
    from affectlens.drift import blocked

    try:
        from affectlens.drift import kernel
    except ImportError:
        return blocked
    return kernel if _converts_halves() else blocked


def _converts_halves() -> bool:
    """Whether the processor that is compiled for converts float16 itself.

    Where it does not, LLVM calls a function that need not exist, and ends the process over it.
    """
    from llvmlite import binding
    from numba.core import config

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if config.CPU_FEATURES is not None:
        return "+f16c" in config.CPU_FEATURES.split(",")
    return bool(binding.get_host_cpu_features().get("f16c"))


def stream(strips: Sequence[Strip], sums_of: Callable[[Part], Sums], *, tell: Tell) -> dict[Strip, Sums]:
    """The sums of each strip; `tell` is called with the bytes that were read.

    As many threads as torch may use (`torch.set_num_threads`, OMP_NUM_THREADS), eight at most; four where
    a hub is read.
    """
    far = any(span.of.remote for strip in strips if not strip.unread for span in strip.spans or ())
    threads = _FAR if far else min(torch.get_num_threads(), _MOST)
    ordered = [part for strip in sorted(strips, key=lambda strip: strip.place) for part in parts(strip)]
    found = {strip: Sums() for strip in strips}
    for part, sums in zip(ordered, _run(sums_of, ordered, threads), strict=True):
        found[part.strip].merge(sums)
        tell(part.bytes)
    return found


def _run(work: Callable[[Part], Sums], every: Iterable[Part], threads: int) -> Iterator[Sums]:
    if threads == 1:
        yield from map(work, every)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="affectlens")
    left = iter(every)
    try:
        # Only so many are under way that an interrupt, which waits for them, is answered at once.
        ahead: list[Future[Sums]] = [pool.submit(work, part) for part in itertools.islice(left, 2 * threads)]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [pool.submit(work, part) for part in itertools.islice(left, 1)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
