"""Run jobs here or over an executor: each is tried three times, the failed ones are told, the others finish.

    jobs ── a window of them ──▶ executor ──▶ result or Failed, as they end
               └── the pool breaks ──▶ a new one; what was under way runs alone, so the one at fault is found

A job carries paths and keys, never tensors. We write no scheduler: an executor is anything with `submit`.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from affectlens.errors import AffectlensError, ExecutionError

Job = TypeVar("Job")
Result = TypeVar("Result")

TRIES = 3
_MANY = 1000  # jobs under way at an executor that doesn't tell how many workers it has
_LOOK = 1.0  # seconds without news until the pool itself is looked at
_HOPELESS = 10  # pools that broke one after the other, with no job done between


@dataclass(frozen=True)
class Failed:
    """A job that came to nothing: the last error, and how often it was tried."""

    error: BaseException
    tries: int


def execute(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, executor: Any = None
) -> Generator[tuple[Job, Result | Failed], None, None]:
    """Do the work of each job; yields them as they end, with a result or a `Failed`.

    Without an executor it is done here, in order. `executor` has `submit(function, job) -> future`, or is
    a function that makes such a one; a process pool that broke is made anew. An error of ours is not
    tried again: it would come out the same. Raises `ExecutionError` where no pool stays alive.
    """
    if executor is None:
        for job in jobs:
            yield job, _here(work, job)
    else:
        yield from _Spread(work, _Pool(executor), deque(_Try(job) for job in jobs)).run()


def processes(count: int) -> Callable[[], ProcessPoolExecutor]:
    """What makes a pool of fresh processes that end with this one and leave Ctrl-C to it."""
    return lambda: ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_worker, initargs=(os.getpid(),)
    )


def _worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # A pool's workers wait for ever if what made them is killed.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _here(work: Callable[[Job], Result], job: Job) -> Result | Failed:
    for tries in range(1, TRIES + 1):
        try:
            return work(job)
        except AffectlensError as error:
            return Failed(error, tries)
        except Exception as error:
            if tries == TRIES:
                return Failed(error, tries)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class _Try(Generic[Job]):
    job: Job
    number: int = 1

    def again(self) -> "_Try[Job]":
        return _Try(self.job, self.number + 1)


def _tried(job: Job, work: Callable[[Job], Result], number: int) -> Result:
    # By the number a scheduler that remembers calls (dask) knows the second try from the first.
    return work(job)


class _Pool:
    """An executor, or one after the other of them where they break."""

    def __init__(self, given: Any) -> None:
        self._make: Callable[[], Any] | None = None if hasattr(given, "submit") else given
        self._own = self._make is not None
        self._now = self._make() if self._make else given

    @property
    def broken(self) -> bool:
        """Whether no more can be given to a pool."""
        return bool(getattr(self._now, "_broken", False))

    @property
    def width(self) -> int:
        """How many jobs are given out at a time: enough that no worker waits."""
        workers = getattr(self._now, "_max_workers", None)
        return 2 * workers if isinstance(workers, int) and workers > 0 else _MANY

    def submit(self, work: Callable[[Job], Result], one: "_Try[Job]") -> Any:
        return self._now.submit(_tried, one.job, work, one.number)

    def renew(self, why: BaseException) -> None:
        """Put another pool in the place of a broken one; raises what broke it where none can be made."""
        broken = self._now
        _end(broken)
        if self._make is not None:
            self._now = self._make()
        elif isinstance(broken, ProcessPoolExecutor):
            self._now = ProcessPoolExecutor(
                broken._max_workers,  # type: ignore[attr-defined]
                mp_context=broken._mp_context,
                initializer=broken._initializer,
                initargs=broken._initargs,
            )
        else:
            raise ExecutionError(f"the executor broke and can't be made anew: {why}") from why
        self._own = True

    def close(self) -> None:
        """End a pool that was made here; the caller's own is the caller's."""
        if self._own:
            _end(self._now)


def _end(pool: Any) -> None:
    """End a pool and its processes, whatever they are at."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    if isinstance(pool, Executor):
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Spread(Generic[Job, Result]):
    """Jobs over a pool."""

    work: Callable[[Job], Result]
    pool: _Pool
    waiting: deque[_Try[Job]]
    suspects: deque[_Try[Job]] = field(default_factory=deque)  # were under way when a pool broke
    flying: dict[Any, _Try[Job]] = field(default_factory=dict)
    ended: "SimpleQueue[Any]" = field(default_factory=SimpleQueue)
    broken: int = 0  # pools since the last result

    def run(self) -> Iterator[tuple[Job, Result | Failed]]:
        try:
            while self.waiting or self.suspects or self.flying:
                self._fill()
                try:
                    future = self.ended.get(timeout=_LOOK)
                except Empty:
                    # A job given out at the moment of the break is never ended by the pool itself.
                    if self.pool.broken:
                        yield from self._broke(ExecutionError("a worker died"))
                    continue
                one = self.flying.pop(future, None)
                if one is not None:  # else it flew in a pool that broke
                    yield from self._told(one, future)
        finally:
            for future in self.flying:  # of an error or an interrupt; else there are none
                future.cancel()
            self.pool.close()

    def _fill(self) -> None:
        """Give out jobs: a suspect alone, else as many as the pool is wide."""
        while (self.suspects and not self.flying) or (
            not self.suspects and self.waiting and len(self.flying) < self.pool.width
        ):
            line = self.suspects or self.waiting
            try:
                future = self.pool.submit(self.work, line[0])
            except Exception as error:
                if not self.pool.broken:
                    raise
                # Of many kinds: the pool may break while it is starting a process for this job.
                self._renew(error)
                continue
            self.flying[future] = line.popleft()
            told = getattr(future, "add_done_callback", None)
            if told is None:
                self.ended.put(future)
            else:
                told(self.ended.put)

    def _told(self, one: _Try[Job], future: Any) -> Iterator[tuple[Job, Result | Failed]]:
        try:
            result = future.result()
        except BrokenExecutor as error:
            self.flying[future] = one
            yield from self._broke(error)
        except Exception as error:
            if one.number == TRIES or isinstance(error, AffectlensError):
                yield one.job, Failed(error, one.number)
            else:
                self.waiting.append(one.again())
        else:
            self.broken = 0
            yield one.job, result

    def _broke(self, error: BaseException) -> Iterator[tuple[Job, Result | Failed]]:
        """Whose fault it was is not known yet: all that was under way is tried again, one by one."""
        under_way, self.flying = self.flying, {}
        self._renew(error)
        for future, one in under_way.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                yield one.job, future.result()
            elif one.number == TRIES:
                yield one.job, Failed(ExecutionError(f"the worker died: {error}"), one.number)
            else:
                self.suspects.append(one.again())

    def _renew(self, error: BaseException) -> None:
        self.broken += 1
        if self.broken > _HOPELESS:
            raise ExecutionError(
                f"{self.broken} pools broke one after the other, no worker stays alive: {error}"
            )
        self.pool.renew(error)
