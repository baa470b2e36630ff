"""Print the results of the tests of bad inputs and faults: python -m benchmarks.reliability [REPORT.xml …]

They are part of every `make test`; here they run alone, or are read from the reports of finished runs
(`pytest -o junit_family=xunit1 --junit-xml=REPORT.xml`).
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

TESTS = (
    "tests/hostile",
    "tests/test_executing.py",
    "tests/test_files.py",
    "tests/test_long_use.py",
    "tests/test_sharing.py",
    "tests/cli/test_interrupted_runs.py",
    "tests/cli/test_process.py",
    "tests/checkpoints/test_bytes.py",
    "tests/checkpoints/hub/test_downloading.py",
    "tests/checkpoints/hub/test_remote.py",
    "tests/effects/test_journal.py",
    "tests/lens/test_loading.py",
    "tests/lens/test_restoring.py",
    "tests/tasks/test_strangers.py",
    "tests/views/test_evil_names.py",
)


def main() -> None:
    """Print what the tests recorded."""
    if len(sys.argv) > 1:
        _tell([case for report in sys.argv[1:] for case in ElementTree.parse(report).iter("testcase")])
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", "junit_family=xunit1", *TESTS]
        run = subprocess.run([*command, f"--junit-xml={report}"], check=False)
        _tell(list(ElementTree.parse(report).iter("testcase")))
    sys.exit(run.returncode)


def _tell(cases: list[ElementTree.Element]) -> None:
    print("\n| tests | passed | failed | skipped | seconds |\n| --- | --- | --- | --- | --- |")
    for name, own in _by_file(cases):
        lost = sum(any(case.find(kind) is not None for kind in ("failure", "error")) for case in own)
        skipped = sum(case.find("skipped") is not None for case in own)
        seconds = sum(float(case.get("time", 0)) for case in own)
        print(f"| `{name}` | {len(own) - lost - skipped} | {lost} | {skipped} | {seconds:.0f} |")
    print("\n| figure | seen |\n| --- | --- |")
    for row, count in Counter(_figures(cases)).items():
        print(row if count == 1 else f"{row} ({count} times)")


def _by_file(cases: list[ElementTree.Element]) -> Iterator[tuple[str, list[ElementTree.Element]]]:
    for name in TESTS:
        place = name.removesuffix(".py").replace("/", ".")
        own = [case for case in cases if f"{case.get('classname', '')}.".startswith(f"{place}.")]
        if own:
            yield name, own


def _figures(cases: list[ElementTree.Element]) -> list[str]:
    properties = (one for case in cases for one in case.iter("property"))
    return [f"| {one.get('name')} | {one.get('value')} |" for one in properties]


if __name__ == "__main__":
    main()
