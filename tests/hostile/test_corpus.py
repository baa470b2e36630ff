"""Every hostile or broken input: a clear error or a clear warning, nothing executed, nothing else opened."""

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import running
from tests.hostile.case import Case
from tests.hostile.corpus import CASES
from tests.hostile.decoys import lay_decoys
from tests.hostile.running import Ran, Server, run_installed
from tests.hostile.writing import model

_FIRST = {case.family: case for case in reversed(CASES)}  # one of each family


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input_gets_what_it_must(case: Case, tmp_path: Path, server: Server) -> None:
    """In a warm process that notes what it opens and starts."""
    lay_decoys(tmp_path)
    argv = case.build(tmp_path)

    found = server.run(argv, tmp_path.with_name(f"{tmp_path.name}-output"))

    assert [] == found.strayed(tmp_path, argv)
    _judge(case, found)


@pytest.mark.parametrize("case", _FIRST.values(), ids=lambda case: case.family)
def test_the_program_itself_does_the_same(case: Case, tmp_path: Path) -> None:
    """`python -m affectlens`, from its start to its end, on one case a family."""
    lay_decoys(tmp_path)

    _judge(case, run_installed(case.build(tmp_path)))


@pytest.mark.parametrize(
    ("limit", "value", "ended"), [("PATIENCE", 0, signal.SIGKILL), ("SECONDS", -1, signal.SIGXCPU)]
)
def test_a_late_run_is_ended_and_the_next_one_is_sound(
    limit: str,
    value: int,
    ended: signal.Signals,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both limits are enforced, and another process takes the place of the one that they end."""
    argv = ["diff", *(str(model(tmp_path / side)) for side in ("base", "tuned"))]
    with monkeypatch.context() as patch:
        patch.setattr(running, limit, value)
        late = server.run(argv, tmp_path / "late")
    after = server.run(argv, tmp_path / "after")

    assert (True, -ended) == (late.late, late.code)
    assert (False, 0) == (after.late, after.code)


def test_no_two_cases_have_one_name(record_property: Callable[[str, object], None]) -> None:
    """A name picks a case."""
    names = [case.name for case in CASES]
    families = Counter(case.family for case in CASES)

    assert sorted(set(names)) == sorted(names)
    refused = sum(case.outcome == "refused" for case in CASES)
    record_property(
        "hostile and broken inputs", f"{len(names)}: {refused} refused, {len(names) - refused} told"
    )
    record_property("of these by family", ", ".join(f"{name} {count}" for name, count in families.items()))


def _judge(case: Case, found: Ran) -> None:
    """Check how a run ended and what it printed: an error on standard error, a warning on the output."""
    refused = case.outcome == "refused"
    said = " ".join((found.err if refused else found.out).split())  # the terminal's line breaks are no matter

    assert (False, int(refused)) == (found.late, found.code), found.err[-2000:]
    assert [] == found.unfit, found.out + found.err
    assert [] == [words for words in case.says if " ".join(words.split()) not in said], said
    if refused:
        assert 1 <= len(found.err.splitlines()) <= 3, found.err
