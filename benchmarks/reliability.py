"""What the tests of hostile inputs and of faults saw, as a table: python -m benchmarks.reliability

They are the tests of every run of `make test`; here their figures are collected.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

TESTS = (
    "tests/hostile",
    "tests/test_executing.py",
    "tests/test_files.py",
    "tests/test_long_use.py",
    "tests/test_sharing.py",
    "tests/cli/test_breaking_off.py",
    "tests/cli/test_ending.py",
    "tests/checkpoints/test_changing.py",
    "tests/checkpoints/test_downloading.py",
    "tests/checkpoints/test_hub.py",
    "tests/effects/test_resuming.py",
    "tests/lens/test_loading.py",
    "tests/lens/test_restoring.py",
)


def main() -> None:
    """Run the tests and print what they recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-o", "junit_family=xunit1", *TESTS, f"--junit-xml={report}"],
            check=False,
        )
        cases = list(ElementTree.parse(report).iter("testcase"))
    print("\n| what | tests | failed | seconds |\n| --- | --- | --- | --- |")
    for name, own in _by_file(cases).items():
        lost = sum(case.find("failure") is not None or case.find("error") is not None for case in own)
        seconds = sum(float(case.get("time", 0)) for case in own)
        print(f"| `{name}` | {len(own)} | {lost} | {seconds:.0f} |")
    print("\n| figure | seen |\n| --- | --- |")
    for row, count in Counter(_figures(cases)).items():
        print(row if count == 1 else f"{row} ({count} times)")
    sys.exit(run.returncode)


def _by_file(cases: list[ElementTree.Element]) -> dict[str, list[ElementTree.Element]]:
    found: dict[str, list[ElementTree.Element]] = {}
    for case in cases:
        found.setdefault(case.get("classname", "").replace(".", "/"), []).append(case)
    return found


def _figures(cases: list[ElementTree.Element]) -> list[str]:
    properties = (one for case in cases for one in case.iter("property"))
    return [f"| {one.get('name')} | {one.get('value')} |" for one in properties]


if __name__ == "__main__":
    main()
