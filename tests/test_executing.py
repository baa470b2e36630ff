"""Jobs over executors: each runs once, a failed one is retried, a broken pool is replaced by its factory."""

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
    """Record that the job started, then do it."""
    number, folder = job
    with (folder / str(number)).open("a") as log:
        log.write("x")
    return 2 * number


def dying(job: tuple[int, Path]) -> int:
    """Run a job; the job 3 kills its worker."""
    found = double(job)
    if job[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def dying_once(job: tuple[int, Path]) -> int:
    """Run a job; the job 3 kills its worker the first time."""
    found = double(job)
    if job[0] == 3 and len((job[1] / "3").read_text()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def failing(job: tuple[int, Path]) -> int:
    """Run a job; the job 3 raises a foreign error, 4 one of affectlens."""
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


@contextmanager
def factory() -> Iterator[Callable[[], Executor]]:
    yield spawned


EXECUTORS: dict[str, Callable[[], Any]] = {
    "here": here,
    "threads": lambda: ThreadPoolExecutor(2),
    "given processes": spawned,
    "processes": factory,
    "dask": dask,
    "executorlib": executorlib,
}
KILLABLE = [name for name in EXECUTORS if name not in ("here", "threads", "given processes")]
quiet = pytest.mark.filterwarnings("ignore")  # what other packages say of their dying workers


def counted(folder: Path) -> dict[str, int]:
    return {file.name: len(file.read_text()) for file in folder.iterdir()}


@quiet
@pytest.mark.parametrize("kind", EXECUTORS)
def test_every_job_is_done_once(kind: str, tmp_path: Path) -> None:
    """Each job yields its own result under every executor."""
    with EXECUTORS[kind]() as executor:
        found = dict(execute(double, [(n, tmp_path) for n in range(8)], executor=executor))

    assert {(n, tmp_path): 2 * n for n in range(8)} == found
    assert {str(n): 1 for n in range(8)} == counted(tmp_path)


@quiet
@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_job_that_fails_is_reported_and_the_others_finish(kind: str, tmp_path: Path) -> None:
    """A job is tried three times, once for an error of affectlens, which arrives whole."""
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
    """Return the outcomes of eight jobs; a job that dask's scheduler loses must not block the test."""
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
    """A job that kills every worker is the only one that fails."""
    with EXECUTORS[kind]() as executor:
        found = ended(kind, dying, tmp_path, executor=executor)
    poison = found.pop((3, tmp_path))

    assert isinstance(poison, Failed)
    assert {(n, tmp_path): 2 * n for n in range(8) if n != 3} == found
    assert poison.tries <= 3


@quiet
@pytest.mark.parametrize("kind", KILLABLE)
def test_a_worker_that_is_killed_costs_no_job(kind: str, tmp_path: Path) -> None:
    """Another worker does the job that was running."""
    with EXECUTORS[kind]() as executor:
        found = ended(kind, dying_once, tmp_path, executor=executor)

    assert {(n, tmp_path): 2 * n for n in range(8)} == found


def test_a_broken_pool_is_replaced_by_its_factory(tmp_path: Path) -> None:
    """Pools from a factory are ended at the end, with their workers."""
    made: list[ProcessPoolExecutor] = []

    def make() -> ProcessPoolExecutor:
        made.append(processes(2)())
        return made[-1]

    found = dict(execute(dying_once, [(n, tmp_path) for n in range(4)], executor=make))

    assert {(n, tmp_path): 2 * n for n in range(4)} == found
    assert 2 == len(made)
    assert [] == [p for pool in made for p in (pool._processes or {}).values() if p.is_alive()]


@quiet
def test_a_given_pool_that_breaks_is_not_rebuilt(tmp_path: Path) -> None:
    """Every job that is left fails, with the remedy; a pool that was given is never copied."""
    with spawned() as executor:
        found = dict(execute(dying, [(n, tmp_path) for n in range(40)], executor=executor))
    done = {job[0] for job, outcome in found.items() if not isinstance(outcome, Failed)}
    failed = {job[0]: outcome for job, outcome in found.items() if isinstance(outcome, Failed)}

    assert 40 == len(found)
    assert 3 in failed
    assert done | failed.keys() == set(range(40))
    assert {1} == {failed[n].tries for n in failed if str(n) in counted(tmp_path)}
    assert 0 == failed[39].tries
    for outcome in failed.values():
        assert isinstance(outcome.error, ExecutionError)
        assert str(outcome.error).startswith("the executor broke (")
        assert str(outcome.error).endswith(
            ") and can't be replaced, so this job has no result. Give executor= a function that makes one, "
            "e.g. affectlens.executing.processes(4)"
        )


@pytest.mark.parametrize(
    ("executor", "expected"),
    [
        (4, "executor=4 has no submit(). Give an executor, or a function that makes one"),
        (lambda: 4, "executor= made 4, which has no submit(). Give a function that makes one"),
    ],
)
def test_what_is_no_executor_is_refused(executor: Any, expected: str) -> None:
    """The error shows the object, and names a factory that works."""
    with pytest.raises(ExecutionError) as caught:
        list(execute(str, [1], executor=executor))

    assert f"{expected}, e.g. affectlens.executing.processes(4)" == str(caught.value)


def test_a_class_of_executors_is_a_factory() -> None:
    """It has `submit` too, which needs an instance."""
    assert [(1, "1")] == list(execute(str, [1], executor=ThreadPoolExecutor))


def broken_at_once() -> None:
    os._exit(1)


def test_a_pool_whose_workers_die_at_once_is_given_up(tmp_path: Path) -> None:
    """Ten pools that break in a row are enough, however many jobs there are."""

    def make() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=broken_at_once)

    with pytest.raises(ExecutionError, match="no worker stays alive"):
        list(execute(double, [(n, tmp_path) for n in range(40)], executor=make))


class Results:
    """An executor whose futures have `result` and `cancel` alone."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        class Known:
            def result(self) -> Any:
                return function(*args)

            def cancel(self) -> None:
                pass

        return Known()


def test_a_future_needs_no_more_than_a_result(tmp_path: Path) -> None:
    """Any object with `submit` is an executor."""
    assert [0, 2, 4] == [
        result for _, result in execute(double, [(n, tmp_path) for n in range(3)], executor=Results())
    ]


def test_waiting_jobs_are_cancelled(tmp_path: Path) -> None:
    """Closing the generator cancels the jobs that have no result yet."""
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


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Workers end even if the parent is killed and can't tell them."""
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
