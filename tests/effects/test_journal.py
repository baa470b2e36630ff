"""A sweep that is interrupted at any moment, in any way, and run again gives the uninterrupted table."""

import os
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import affectlens as al
from affectlens.effects import evaluating
from affectlens.effects.journal import Journal
from affectlens.effects.judging import Answers, JudgingJob, SweepContext, collect
from affectlens.errors import JournalError, LensError
from affectlens.executing import processes
from affectlens.lens.inputs.choices import Choices

KILLS = 12
Sweep = Callable[..., al.Effects]


@pytest.fixture(scope="module")
def task(demo: al.Demo) -> al.Task:
    return demo.task("faces-unseen").head(12)


@pytest.fixture(scope="module")
def run(lens: al.Lens, demo: al.Demo, task: al.Task) -> Sweep:
    """A small sweep of about forty models."""

    def sweep(**options: Any) -> al.Effects:
        actions = ("transplant", "revert", "zero")
        grid = al.Grid(demo.base.sites, "role", actions, donor=demo.tuned, control=demo.control, n_random=4)
        return al.sweep(lens, grid, options.pop("task", task), progress=False, **options)

    return sweep


@pytest.fixture(scope="module")
def unbroken(run: Sweep) -> pd.DataFrame:
    return run().frame


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter[JudgingJob]:
    """Count how often each model is judged; the class is restored afterwards."""
    found: Counter[JudgingJob] = Counter()
    judged = SweepContext.judge

    def counted(context: SweepContext, job: JudgingJob) -> Answers:
        found[job] += 1
        return judged(context, job)

    monkeypatch.setattr(SweepContext, "judge", counted)
    return found


def kept(path: Path) -> int:
    with closing(sqlite3.connect(path)) as rows:
        (number,) = rows.execute("SELECT count(*) FROM judged").fetchone()
    return int(number)


def test_a_second_run_judges_nothing_again(
    run: Sweep, unbroken: pd.DataFrame, count: Counter[JudgingJob], tmp_path: Path
) -> None:
    """Results in the journal are reused to the bit."""
    first = run(journal=tmp_path / "sweep")
    once = count.copy()
    second = run(journal=tmp_path / "sweep")

    assert {1} == set(once.values())
    assert once == count
    pd.testing.assert_frame_equal(unbroken, first.frame, check_exact=True)
    pd.testing.assert_frame_equal(unbroken, second.frame, check_exact=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_sweep_that_was_broken_off_goes_on(
    error: type[BaseException],
    run: Sweep,
    unbroken: pd.DataFrame,
    count: Counter[JudgingJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted six times at seeded writes: each model is judged once, and one more per interruption."""
    keep, rng = Journal.keep, np.random.default_rng(0)
    left = 0

    def breaking(journal: Journal, found: Answers) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise error
        keep(journal, found)

    monkeypatch.setattr(Journal, "keep", breaking)
    for places in rng.integers(1, 8, 6):
        left = int(places)
        with pytest.raises(error):
            run(journal=tmp_path / "sweep")
    left = 0
    found = run(journal=tmp_path / "sweep")

    pd.testing.assert_frame_equal(unbroken, found.frame, check_exact=True)
    assert 6 == sum(count.values()) - len(count)


def test_kill_9_at_any_moment_costs_one_model(
    run: Sweep,
    unbroken: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Killed at seeded moments: no kept model is judged again, and the table equals an uninterrupted one."""
    begins: list[float] = []
    journal, log = tmp_path / "sweep", tmp_path / "log"
    judged, keep = SweepContext.judge, Journal.keep

    def noted(context: SweepContext, job: JudgingJob) -> Answers:
        with log.open("a") as stream:
            stream.write("begun\n")
        begins.append(time.monotonic())
        return judged(context, job)

    def noting(self: Journal, found: Answers) -> None:
        keep(self, found)
        with log.open("a") as stream:
            stream.write("".join(f"{key}\n" for key in found))

    monkeypatch.setattr(SweepContext, "judge", noted)
    monkeypatch.setattr(Journal, "keep", noting)
    killed = 0
    rng = np.random.default_rng(0)
    for moment in rng.uniform(0.0, 0.02, KILLS):
        child = os.fork()
        if not child:
            try:
                run(journal=journal)
            finally:
                os._exit(0)
        _wait_for(log, child)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    started = time.monotonic()
    found = run(journal=journal)
    lines = Counter(log.read_text().split())
    begun = lines.pop("begun")

    pd.testing.assert_frame_equal(unbroken, found.frame, check_exact=True)
    assert killed >= KILLS // 2
    assert {1} == set(lines.values())
    assert kept(journal) <= begun <= kept(journal) + killed
    assert begins[0] - started < 2
    record_property("processes killed in a sweep, at seeded moments", killed)
    record_property("models judged again after those kills (at most one each)", begun - kept(journal))
    record_property("seconds from the start of the rerun to its first model", round(begins[0] - started, 2))


def _wait_for(log: Path, child: int) -> None:
    """Wait until the child has begun a model, or has ended."""
    before = log.stat().st_size if log.exists() else 0
    while not (log.exists() and log.stat().st_size > before):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def test_other_weights_or_questions_have_other_keys(
    run: Sweep, lens: al.Lens, task: al.Task, count: Counter[JudgingJob], tmp_path: Path
) -> None:
    """The journal answers neither for a base that is edited at the moment nor for another task."""
    journal = tmp_path / "sweep"
    run(journal=journal)
    before = kept(journal)
    once = sum(count.values())
    gates = lens.sites.where(tower="language", role="gate_proj")
    with lens.intervene(al.Zero(gates.where(layer=0))):
        run(journal=journal)

    assert 2 * before == kept(journal)
    run(journal=journal, task=task.head(6))
    assert 3 * before == kept(journal)
    assert 3 * once >= sum(count.values()) > 2 * once


def test_results_of_processes_are_the_same(run: Sweep, unbroken: pd.DataFrame, tmp_path: Path) -> None:
    """Workers load base and donors by path and give the same table as one process."""
    found = run(executor=processes(1), journal=tmp_path / "sweep")

    pd.testing.assert_frame_equal(unbroken, found.frame, check_exact=True)
    pd.testing.assert_frame_equal(unbroken, run(journal=tmp_path / "sweep").frame, check_exact=True)


def test_a_model_that_a_worker_would_not_see_is_refused(
    run: Sweep, lens: al.Lens, demo: al.Demo, task: al.Task
) -> None:
    """A model in memory, or one changed since it was loaded, is refused: a worker would judge another one."""
    live = al.Lens(lens.model, lens.processor)
    grid = al.Grid(demo.base.sites, donor=demo.tuned, n_random=0)
    with pytest.raises(LensError, match="was not loaded from files"):
        al.sweep(live, grid, task, executor=processes(1), progress=False)
    donor = al.Grid(demo.base.sites, donor=al.load(demo.tuned, dtype="float32").model, n_random=0)
    with pytest.raises(LensError, match="the tuned model is only in memory"):
        al.sweep(lens, donor, task, executor=processes(1), progress=False)
    gates = lens.sites.where(tower="language", role="gate_proj")
    with lens.intervene(al.Zero(gates)), pytest.raises(LensError, match="other weights than this lens has"):
        run(executor=processes(1))


def test_a_model_that_fails_is_told_and_the_others_finish(
    run: Sweep, unbroken: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried three times, left out, listed in `failed`, and is the first notice of the table."""
    judged, tries = SweepContext.judge, Counter[str]()

    def failing(context: SweepContext, job: JudgingJob) -> Answers:
        if any(not step.donor and step.sites[0].role == "q_proj" for step in job.steps):
            tries["zero q"] += 1
            raise OSError("the card fell off the bus")
        return judged(context, job)

    monkeypatch.setattr(SweepContext, "judge", failing)
    found = run()
    left = unbroken[~((unbroken["action"] == "zero") & (unbroken["sites"] == "q_proj"))]

    pd.testing.assert_frame_equal(left.reset_index(drop=True), found.frame, check_exact=True)
    assert {"zero q": 3} == tries
    assert [["zero", "q_proj", "effect", 3]] == found.failed.drop(columns="why").to_numpy().tolist()
    assert "card fell off the bus" in found.notices[0]


def test_base_and_tuned_are_needed(run: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them nothing can be compared, so their error is raised at once."""
    calls: list[JudgingJob] = []

    def failing(context: SweepContext, job: JudgingJob) -> Answers:
        calls.append(job)
        raise LensError("the model's logits hold NaN")

    monkeypatch.setattr(SweepContext, "judge", failing)
    with pytest.raises(LensError, match="hold NaN"):
        run()

    assert 1 == len(calls)


def some_bytes(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as rows:
        rows.execute("CREATE TABLE accounts (name TEXT)")


def cut_short(path: Path) -> None:
    with closing(Journal(path)) as journal:
        journal.keep({"k": np.zeros((40, 40), "f4")})
    path.write_bytes(path.read_bytes()[:5000])


def other_numbers(path: Path) -> None:
    Journal(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as rows:
        rows.execute("INSERT INTO judged VALUES ('k', '', 1000000000, 1000000000, x'00')")


def test_a_file_that_is_no_journal_is_closed_again(tmp_path: Path) -> None:
    """Once it is refused, no connection to it is left for the garbage collector."""
    path = tmp_path / "sweep"
    other_database(path)
    opened = []

    def connect(*args: Any, **settings: Any) -> sqlite3.Connection:
        opened.append(sqlite3.Connection(*args, **settings))
        return opened[-1]

    with mock.patch.object(sqlite3, "connect", connect), pytest.raises(JournalError):
        Journal(path)

    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (some_bytes, "can't be used as a journal"),
        (other_database, "another program's database"),
        (cut_short, "can't be used as a journal"),
        (other_numbers, "the journal is broken"),
        (lambda path: os.mkfifo(path), "not an ordinary file"),
    ],
    ids=["bytes", "database", "cut", "numbers", "fifo"],
)
def test_what_is_no_journal_is_told(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """The error names the path, and the file stays as it is."""
    path = tmp_path / "sweep"
    make(path)
    before = path.stat().st_size
    with pytest.raises(JournalError, match=message) as caught, closing(Journal(path)) as journal:
        journal.found("k")

    assert str(path) in str(caught.value)
    assert before == path.stat().st_size


def test_a_full_disk_keeps_what_was_kept(tmp_path: Path) -> None:
    """The error names the journal, whose earlier results can still be read."""
    path, block = tmp_path / "sweep", np.ones((100, 100), "f4")

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        journal = Journal(path)
        try:
            for number in range(100):
                journal.keep({f"k{number}": block})
                (tmp_path / "done").write_text(str(number))
        except JournalError as error:
            (tmp_path / "error").write_text(str(error))

    child = os.fork()
    if not child:
        try:
            fill()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    last = int((tmp_path / "done").read_text())
    with closing(Journal(path)) as journal:
        kept = [journal.found(f"k{number}") for number in range(last + 1)]

    assert str(path) in (tmp_path / "error").read_text()
    assert 0 < last < 99
    assert all((block == found).all() for found in kept)


def test_memory_that_runs_out_halves_the_batch(
    lens: al.Lens, demo: al.Demo, run: Sweep, unbroken: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only five examples fit, a batch of twenty gives the same answers, and a sweep the same table."""
    task = demo.task("faces-unseen").head(20)
    expected = al.evaluate(lens, task)
    said = al.evaluate(lens, task, answer="greedy", max_new_tokens=1).frame["text"]
    sizes = limit(monkeypatch, 5)
    found = al.evaluate(lens, task)
    again = al.evaluate(lens, task, answer="greedy", max_new_tokens=1).frame["text"]

    pd.testing.assert_frame_equal(expected.frame, found.frame, atol=1e-5)
    assert list(said) == list(again)
    assert [20, 10, 5, 5, 5, 5] == sizes[:6]
    sizes.clear()
    swept = run().frame
    pd.testing.assert_frame_equal(unbroken, swept, atol=1e-5)
    assert [12, 6, 3] == sizes[:3]
    assert {3} == set(sizes[3:])


def test_one_example_too_many_is_told(lens: al.Lens, demo: al.Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the task if no example fits; other errors of the model pass unchanged."""
    task = demo.task("faces-unseen").head(4)
    limit(monkeypatch, 0)
    with pytest.raises(LensError, match="task 'faces-unseen': not enough memory for even one example"):
        al.evaluate(lens, task)
    limit(monkeypatch, 0, RuntimeError("expected scalar type Float but found BFloat16"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        al.evaluate(lens, task)


def limit(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception | None = None) -> list[int]:
    """Make a forward pass of more than `most` examples run out of memory; return the sizes tried."""
    sizes: list[int] = []
    score = evaluating.scored

    def limited(model: nn.Module, asked: Choices) -> torch.Tensor:
        sizes.append(len(asked.labels))
        if sizes[-1] > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return score(model, asked)

    def limited_generate(lens: al.Lens, *examples: al.Example, **options: Any) -> list[str]:
        if len(examples) > most:
            raise MemoryError
        return generate(lens, *examples, **options)

    generate = al.Lens.generate
    monkeypatch.setattr(evaluating, "scored", limited)
    monkeypatch.setattr(al.Lens, "generate", limited_generate)
    return sizes


def test_nothing_asked_is_nothing_done(lens: al.Lens) -> None:
    """An empty sweep opens no journal and has no failures."""
    assert ({}, {}) == collect(SweepContext(lens, {}, {}), [], needed=())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_state_of_adapters_is_a_part_of_the_key() -> None:
    """A sweep that is resumed without the adapter, or at another scale, must not reuse the results."""
    demo = al.load_demo()
    lens = al.load(demo.base, dtype="float32")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = al.Lens(get_peft_model(lens.model, config), lens.processor)
    keys = {"on": SweepContext(adapted, {}, {}).weights}
    keys["off"] = SweepContext(adapted.without_adapter(), {}, {}).weights
    with adapted.model.disable_adapter():  # type: ignore[operator]
        keys["disabled"] = SweepContext(adapted, {}, {}).weights
    next(m for m in adapted.model.modules() if hasattr(m, "set_scale")).set_scale("default", 2.0)  # type: ignore[operator]
    keys["rescaled"] = SweepContext(adapted, {}, {}).weights

    assert len(set(keys.values())) == len(keys)
