"""Run jobs here or over an executor: retry a job that fails, report it, and finish the others.

    jobs ─ a few at a time ─▶ executor ─▶ a result or a Failed for each, as they end
              └─ the pool breaks ─▶ a new one from the factory; interrupted jobs then run alone,
                                    so that the job which kills its worker is found

An executor is anything with `submit(function, job)`. A job carries paths and keys, never tensors.
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
_FACTORY = "a function that makes one, e.g. affectlens.executing.processes(4)"
_MANY = 1000  # jobs in flight on an executor that does not tell how many workers it has
_LOOK = 1.0  # seconds without a result before the pool itself is checked
_HOPELESS = 10  # pools that broke in a row, with no job done in between


@dataclass(frozen=True)
class Failed:
    """A job without a result: its last error, and how often it was tried."""

    error: BaseException
    tries: int


def execute(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, executor: Any = None
) -> Generator[tuple[Job, Result | Failed], None, None]:
    """Do the work of each job and yield it with its result, or with a `Failed`, as they end.

    Without an executor the jobs run here, in order. `executor` is an object with `submit(function, job)`,
    which returns a future, or a function without arguments that makes such an executor. If a pool breaks,
    the function makes a new one; without it every job that is left fails. A job is tried three times, but
    once if it raises an error of affectlens, which would come out the same again.

    Raises `ExecutionError` for an object that is no executor, and when ten new pools break in a row.
    """
    if executor is None:
        for job in jobs:
            yield job, _here(work, job)
    else:
        yield from _Run(work, _Pool(executor), deque(_Try(job) for job in jobs)).outcomes()


def processes(count: int) -> Callable[[], ProcessPoolExecutor]:
    """Return a factory of pools of `count` fresh processes.

    The processes end when the process that made them ends, even if that is killed, and ignore Ctrl-C, which
    is for the parent to handle.
    """
    return lambda: ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_worker, initargs=(os.getpid(),)
    )


def _worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # Workers of a pool wait for jobs forever if their parent is killed.
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
    # The number makes a retry a different call: dask would return the remembered error of the first one.
    return work(job)


class _Pool:
    """An executor that was given, or the latest one from a factory."""

    def __init__(self, given: Any) -> None:
        # A class such as ThreadPoolExecutor has `submit` too, but is a factory.
        ready = hasattr(given, "submit") and not isinstance(given, type)
        if not ready and not callable(given):
            raise ExecutionError(f"executor={given!r} has no submit(). Give an executor, or {_FACTORY}")
        self._factory: Callable[[], Any] | None = None if ready else given
        self._now = given if ready else self._made()

    def _made(self) -> Any:
        assert self._factory is not None
        made = self._factory()
        if not hasattr(made, "submit"):
            raise ExecutionError(f"executor= made {made!r}, which has no submit(). Give {_FACTORY}")
        return made

    @property
    def broken(self) -> bool:
        """True for a pool that takes no more jobs, where it can be seen."""
        return bool(getattr(self._now, "_broken", False))

    @property
    def width(self) -> int:
        """The number of jobs to keep in flight: enough that no worker waits.

        No more than that, since all of them are suspects when the pool breaks, and run alone.
        """
        workers = getattr(self._now, "_max_workers", None)
        return 2 * workers if isinstance(workers, int) and workers > 0 else _MANY

    def submit(self, work: Callable[[Job], Result], one: "_Try[Job]") -> Any:
        return self._now.submit(_tried, one.job, work, one.number)

    def replace(self) -> bool:
        """Make a new pool; return False if no factory was given."""
        if self._factory is None:
            return False
        _end(self._now)
        self._now = self._made()
        return True

    def close(self) -> None:
        """End the pool if it was made here; the caller ends its own."""
        if self._factory is not None:
            _end(self._now)


def _end(pool: Any) -> None:
    """End a pool and its processes, whatever they are doing."""
    # `shutdown` alone would wait for the jobs that run, which may take hours.
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    if isinstance(pool, Executor):
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Run(Generic[Job, Result]):
    """The state of one `execute` over a pool."""

    work: Callable[[Job], Result]
    pool: _Pool
    waiting: deque[_Try[Job]]
    suspects: deque[_Try[Job]] = field(default_factory=deque)  # were in flight when a pool broke
    flying: dict[Any, _Try[Job]] = field(default_factory=dict)
    ended: "SimpleQueue[Any]" = field(default_factory=SimpleQueue)
    broken: int = 0  # pools since the last result

    def outcomes(self) -> Iterator[tuple[Job, Result | Failed]]:
        try:
            while self.waiting or self.suspects or self.flying:
                if (error := self._fill()) is not None:
                    yield from self._broke(error)
                    continue
                try:
                    future = self.ended.get(timeout=_LOOK)
                except Empty:
                    # Python's pool never ends a job that it took at the moment it broke.
                    if self.pool.broken:
                        yield from self._broke(ExecutionError("a worker died"))
                    continue
                one = self.flying.pop(future, None)
                if one is not None:  # otherwise it belongs to a pool that broke
                    yield from self._outcome(one, future)
        finally:
            for future in self.flying:  # empty unless an error or an interrupt ended the loop
                future.cancel()
            self.pool.close()

    def _fill(self) -> Exception | None:
        """Submit jobs: one suspect alone, or as many others as the pool is wide.

        Return the error if the pool turns out to be broken.
        """
        while (self.suspects and not self.flying) or (
            not self.suspects and self.waiting and len(self.flying) < self.pool.width
        ):
            line = self.suspects or self.waiting
            try:
                future = self.pool.submit(self.work, line[0])
            except Exception as error:
                # Any error may come out of a pool that breaks while it starts a process for this job.
                if self.pool.broken:
                    return error
                raise
            self.flying[future] = line.popleft()
            when_done = getattr(future, "add_done_callback", None)
            if when_done is None:
                self.ended.put(future)  # its result() waits
            else:
                when_done(self.ended.put)
        return None

    def _outcome(self, one: _Try[Job], future: Any) -> Iterator[tuple[Job, Result | Failed]]:
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
        """Replace the pool and put what was in flight in line to run alone, or give up all jobs."""
        in_flight, self.flying = self.flying, {}
        self.broken += 1
        if self.broken > _HOPELESS:
            raise ExecutionError(
                f"{self.broken} pools broke in a row, no worker stays alive ({error}). Check that a worker "
                "has enough memory and can import affectlens"
            )
        replaced = self.pool.replace()
        for future, one in in_flight.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                yield one.job, future.result()
            elif one.number == TRIES or not replaced:
                yield one.job, Failed(_died(error, replaced=replaced), one.number)
            else:
                self.suspects.append(one.again())
        if not replaced:
            for one in (*self.suspects, *self.waiting):
                yield one.job, Failed(_died(error, replaced=False), one.number - 1)
            self.suspects.clear()
            self.waiting.clear()


def _died(error: BaseException, *, replaced: bool) -> ExecutionError:
    if replaced:
        return ExecutionError(f"the worker died ({error})")
    why = f"the executor broke ({error}) and can't be replaced, so this job has no result"
    return ExecutionError(f"{why}. Give executor= {_FACTORY}")
