"""Long runs tell how far they are, in terminals, notebooks and logs, and leave nothing behind."""

import io
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from affectlens import progress
from affectlens.progress import each, shown


class Terminal(io.StringIO):
    """A stream that says that somebody looks at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose time is in the list."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_thirty_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Done, total and time left; the last line says how long it took."""
    with shown(100, unit="model", what="sweep", initial=20) as step:
        for _ in range(80):
            clock[0] += 10
            step(1)

    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "sweep: 23 of 100 models, 23 %, 12 min left",
        "sweep: 26 of 100 models, 26 %, 12 min left",
    ]
    assert len(lines) == 80 * 10 // 30 + 1
    assert lines[-1] == "sweep: done in 13 min"


@pytest.mark.parametrize(("total", "unit", "first"), [(3, "model", ""), (0, "model", ""), (5, "B", "")])
def test_what_is_short_says_nothing(
    total: int, unit: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in a log nor in a terminal."""
    assert list(each(range(total), total=total, unit=unit, what="x")) == list(range(total))
    assert capsys.readouterr().err == first


def test_an_error_is_not_called_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """The lines end where the run did."""

    def run() -> None:
        with shown(9, unit="B", what="diff") as step:
            clock[0] += 40
            step(3)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run()

    assert capsys.readouterr().err == "diff: 0.0 of 0.0 GB, 33 %, 1 min 20 s left\n"


def test_a_terminal_gets_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last act is to wipe the line."""
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with shown(4, unit="model", what="sweep") as step:
        step(1)
        time.sleep(0.15)
        step(2)

    found = stream.getvalue()
    assert "sweep:  75%" in found
    assert not found.rpartition("\r")[2].strip()


def test_a_notebook_gets_one_widget_that_goes(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """One output, updated twice a second, empty in the end, also after an error."""
    seen: list[Any] = []
    handle = SimpleNamespace(update=lambda data, raw: seen.append(data))
    monkeypatch.setattr(progress, "_notebook", lambda: lambda data, **_: handle)

    def run() -> None:
        with shown(100, unit="model", what="sweep") as step:
            for _ in range(50):
                clock[0] += 0.1
                step(1)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run()

    assert 5 <= len(seen) <= 8
    assert 'value="20"' in seen[0]["text/html"]
    assert seen[-1] == {"text/plain": ""}


def test_nothing_is_shown_where_nothing_is_asked_for(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """`progress=False` of a function is `show=False` here."""
    with shown(10, unit="model", what="sweep", show=False) as step:
        clock[0] += 100
        step(1)

    assert not capsys.readouterr().err
