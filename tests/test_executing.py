"""Jobs over executors: each once, two more tries, a new pool for a broken one, and the failed ones told."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from affectlens.errors import CheckpointError, ExecutionError
from affectlens.executing import Failed, execute, processes


def double(job: tuple[int, Path]) -> int:
    """Note that it was begun, then do it."""
    number, folder = job
    with (folder / str(number)).open("a") as log:
        log.write("x")
    return 2 * number


def dying(job: tuple[int, Path]) -> int:
    """The job 3 kills its worker, whoever that is."""
    found = double(job)
    if job[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def dying_once(job: tuple[int, Path]) -> int:
    """The job 3 kills its worker the first time."""
    found = double(job)
    if job[0] == 3 and len((job[1] / "3").read_text()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def failing(job: tuple[int, Path]) -> int:
    """The job 3 fails with an error of its own, 4 with one of ours."""
    found = double(job)
    if job[0] == 3:
        raise OSError("the disk of the worker is full")
    if job[0] == 4:
        raise CheckpointError("model.safetensors", "is broken", key="a.weight", fix="Download it again")
    return found


@contextmanager
def here() -> Iterator[None]:
    yield None


@contextmanager
def dask() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        yield client  # its get_executor() loses a job whose result lay at a worker that died


@contextmanager
def executorlib() -> Iterator[Executor]:
    with pytest.importorskip("executorlib").SingleNodeExecutor(max_workers=2) as executor:
        yield executor


def spawned() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


EXECUTORS: dict[str, Callable[[], Any]] = {
    "here": here,
    "threads": lambda: ThreadPoolExecutor(2),
    "processes": spawned,
    "dask": dask,
    "executorlib": executorlib,
}
KILLABLE = [name for name in EXECUTORS if name not in ("here", "threads")]
quiet = pytest.mark.filterwarnings("ignore")  # what other packages say of their dying workers


def counted(folder: Path) -> dict[str, int]:
    return {file.name: len(file.read_text()) for file in folder.iterdir()}


@quiet
@pytest.mark.parametrize("kind", EXECUTORS)
def test_every_job_is_done_once(kind: str, tmp_path: Path) -> None:
    """Each gives its own result, whoever does it."""
    with EXECUTORS[kind]() as executor:
        found = dict(execute(double, [(n, tmp_path) for n in range(8)], executor=executor))

    assert {(n, tmp_path): 2 * n for n in range(8)} == found
    assert {str(n): 1 for n in range(8)} == counted(tmp_path)


@quiet
@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_job_that_fails_is_told_and_the_others_finish(kind: str, tmp_path: Path) -> None:
    """A foreign error is tried three times; one of ours would come out the same, and travels whole."""
    with EXECUTORS[kind]() as executor:
        found = dict(execute(failing, [(n, tmp_path) for n in range(8)], executor=executor))
    foreign, ours = found.pop((3, tmp_path)), found.pop((4, tmp_path))

    assert {(n, tmp_path): 2 * n for n in (0, 1, 2, 5, 6, 7)} == found
    assert isinstance(foreign, Failed)
    assert isinstance(ours, Failed)
    assert (3, "the disk of the worker is full") == (foreign.tries, str(foreign.error))
    assert (1, "a.weight") == (ours.tries, getattr(ours.error, "key", None))
    assert {"3": 3, "4": 1} == {name: counted(tmp_path)[name] for name in ("3", "4")}


def ended(kind: str, work: Callable[[Any], int], folder: Path, *, executor: Any) -> dict[Any, Any]:
    """What came of eight jobs. What dask's scheduler loses would keep the test for ever."""
    found: dict[Any, Any] = {}

    def run() -> None:
        with suppress(Exception if kind == "dask" else ()):
            found.update(execute(work, [(n, folder) for n in range(8)], executor=executor))

    if kind != "dask":
        run()
        return found
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    if thread.is_alive():
        pytest.skip("dask lost a job")
    return found


@quiet
@pytest.mark.parametrize("kind", KILLABLE)
def test_a_poison_job_is_found_and_the_others_finish(kind: str, tmp_path: Path) -> None:
    """It kills each worker it is given to: it alone is listed as failed."""
    with EXECUTORS[kind]() as executor:
        found = ended(kind, dying, tmp_path, executor=executor)
    poison = found.pop((3, tmp_path))

    assert isinstance(poison, Failed)
    assert {(n, tmp_path): 2 * n for n in range(8) if n != 3} == found
    assert poison.tries <= 3


@quiet
@pytest.mark.parametrize("kind", KILLABLE)
def test_a_worker_that_is_killed_costs_no_job(kind: str, tmp_path: Path) -> None:
    """What it was at is given to another."""
    with EXECUTORS[kind]() as executor:
        found = ended(kind, dying_once, tmp_path, executor=executor)

    assert {(n, tmp_path): 2 * n for n in range(8)} == found


def test_a_pool_is_made_anew_from_what_makes_it(tmp_path: Path) -> None:
    """Given a function, the pool is ours: its workers are gone in the end."""
    made: list[ProcessPoolExecutor] = []

    def make() -> ProcessPoolExecutor:
        made.append(processes(2)())
        return made[-1]

    found = dict(execute(dying_once, [(n, tmp_path) for n in range(4)], executor=make))

    assert {(n, tmp_path): 2 * n for n in range(4)} == found
    assert 2 == len(made)
    assert [] == [p for pool in made for p in (pool._processes or {}).values() if p.is_alive()]


def broken_at_once() -> None:
    os._exit(1)


def test_a_pool_whose_workers_die_at_once_is_given_up(tmp_path: Path) -> None:
    """However many jobs there are, and in the words of what is wrong."""
    make = lambda: ProcessPoolExecutor(  # noqa: E731  one line for one thing
        1, mp_context=get_context("fork"), initializer=broken_at_once
    )
    with pytest.raises(ExecutionError, match="no worker stays alive"):
        list(execute(double, [(n, tmp_path) for n in range(40)], executor=make))


class Results:
    """An executor whose futures have a result and nothing else."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        class Known:
            def result(self) -> Any:
                return function(*args)

            def cancel(self) -> None:
                pass

        return Known()


def test_a_future_needs_no_more_than_a_result(tmp_path: Path) -> None:
    """Anything with submit will do."""
    assert [0, 2, 4] == [
        result for _, result in execute(double, [(n, tmp_path) for n in range(3)], executor=Results())
    ]


def test_what_is_left_is_taken_back(tmp_path: Path) -> None:
    """Of a run that is broken off, jobs that wait are cancelled."""
    given: list[Future[Any]] = []

    class Waiting(Executor):
        def submit(self, function: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
            given.append(Future())
            if len(given) == 1:
                given[0].set_result(function(*args))
            return given[-1]

    with closing(execute(double, [(n, tmp_path) for n in range(5)], executor=Waiting())) as outcomes:
        next(outcomes)

    assert 5 == len(given)
    assert all(future.cancelled() for future in given[1:])


ORPHANS = """
import time
from affectlens.executing import execute, processes

if __name__ == "__main__":
    pool = processes(2)()
    print(*pool.map(int, [1, 2]), flush=True)
    print(*pool._processes, flush=True)
    time.sleep(60)
"""


def test_workers_end_with_what_made_them(tmp_path: Path) -> None:
    """Also where that is killed and can tell them nothing."""
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    run.stdout.readline()
    workers = [int(word) for word in run.stdout.readline().split()]
    run.kill()
    run.wait()
    run.stdout.close()
    until = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)

    assert 2 == len(workers)
    assert [] == [pid for pid in workers if Path(f"/proc/{pid}").exists()]
