"""The benchmark of writing runs and prints its table; this test compares no times."""

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.diff.generating import INDEX


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_the_benchmark_prints_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints time and memory of the copy and of the transplant, and deletes what it wrote."""
    arguments = ["--size", "small", "--folder", str(tmp_path), "--what", "gate", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.writing", *arguments])
    runpy.run_module("benchmarks.writing", run_name="__main__")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {line[0].removeprefix("| "): line[1:] for line in lines}

    assert {"what", "---", "copy", "gate"} == found.keys()
    assert 20 < float(found["gate"][3]) < 1000
    assert {"base", "all"} == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "base" / INDEX).exists()
