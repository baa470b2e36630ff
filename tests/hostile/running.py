"""Run the command line on a case: in a warm process, or as the real program."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 20  # of processor time that a run may take, whatever else the machine does
PATIENCE = 120  # seconds until a run that takes no processor time counts as hanging
CANARY = "canary-7f3a"  # in every file that no run may open
_UNSEEN = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
_OURS = [
    Path(os.path.realpath(place))
    for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[2], os.devnull)
]
_ON_FILES = re.compile(r"open|write|os\.(?:remove|rename|rmdir|mkdir|link|symlink|truncate|chmod)")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "COLUMNS": "100",
}


@dataclass(frozen=True)
class Ran:
    """How a run ended, what it printed, and what it opened, started and changed where that was watched."""

    code: int
    late: bool
    seconds: float
    out: str
    err: str
    events: tuple[tuple[str, ...], ...] = ()

    def strayed(self, root: Path, argv: list[str]) -> list[str]:
        """What a run did beyond reading its inputs: open and change other files, start programs, connect."""
        given = [_real(word) for word in argv if word.startswith(str(root))]
        inputs = [path for path in given if _is_folder(path)]
        files = [path.parent for path in given if not _is_folder(path)]  # of an input or an output
        beyond = []
        for event, *args in self.events:
            path = _real(args[0]) if _ON_FILES.fullmatch(event) else None
            allowed = [*inputs, *files, *_OURS] if event == "open" else files
            within = path is not None and any(path.is_relative_to(folder) for folder in allowed)
            if not within and not _compiled(path):
                beyond.append(" ".join((event, *args)))
        return beyond

    @property
    def unfit(self) -> list[str]:
        """What may not be in any output."""
        both = self.out + self.err
        found = [f"{ord(char):#x}" for char in sorted(set(_UNSEEN.findall(both)))]
        words = ("Traceback", "internal error", "not enough memory", CANARY)
        return found + [word for word in words if word in both]


class Server:
    """The warm process; another one takes its place when a run kills it or is late."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, argv: list[str], scratch: Path, *, warns: bool = False) -> Ran:
        """Run `affectlens` with these arguments; `scratch` is a folder for the output.

        With `warns` the warnings of libraries are shown on standard error.
        """
        scratch.mkdir()
        files = {name: str(scratch / name) for name in ("out", "err", "log")}
        for file in files.values():
            Path(file).touch()
        process = self._process = self._process or _start()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"argv": argv, "seconds": SECONDS, "warns": warns, **files}) + "\n")
        process.stdin.flush()
        began = time.monotonic()
        reply = _line(process, PATIENCE)
        seconds = time.monotonic() - began
        if not reply:
            self.close()
        code = int(reply) if reply else process.returncode
        out, err, log = (Path(file).read_bytes().decode("utf-8", "replace") for file in files.values())
        events = tuple(tuple(json.loads(line)) for line in log.splitlines())
        return Ran(code, reply is None or code == -signal.SIGXCPU, seconds, out, err, events)

    def close(self) -> None:
        """End the process, which may hang."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> "subprocess.Popen[str]":
    program = [sys.executable, str(Path(__file__).with_name("serving.py"))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, env=_environment())
    assert "ready\n" == _line(process, 10 * PATIENCE)
    return process


def _line(process: "subprocess.Popen[str]", seconds: float) -> str | None:
    """Read the next line that a process prints: None if it is late, an empty one if the process ends."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else None


def run_installed(argv: list[str]) -> Ran:
    """Run the real program; what it opens is not watched."""
    program: list[Any] = [sys.executable, "-m", "affectlens", *argv]
    began = time.monotonic()
    try:
        done = subprocess.run(program, capture_output=True, env=_environment(), timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return Ran(-9, True, time.monotonic() - began, "", "")
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return Ran(done.returncode, False, time.monotonic() - began, out, err)


def _environment() -> dict[str, str]:
    return {**os.environ, **_ENVIRONMENT}


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _compiled(path: Path | None) -> bool:
    """Whether this is what Python or numba keeps of our code."""
    return path is not None and "__pycache__" in path.parts and any(map(path.is_relative_to, _OURS))


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  Path's own raises where a name is too long
