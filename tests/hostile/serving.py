"""The warm process: it imports the command line once and then runs one case after another.

A program of its own, started by `running`. A line of JSON in asks for a run, a line out is its exit code.
Each run gets limits, writes its output to files, and an audit hook notes what it opens and starts. A fork for
each run would take longer than most runs do. The system ends this process when a run takes too much processor
time, `running` when it hangs.
"""

import gc
import json
import math
import os
import re
import resource
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

_MEMORY = 4 << 30  # bytes of addresses above those that the process has when a run begins
# What starts another program, reaches for a network, or changes files.
_TELLING = re.compile(
    r"subprocess\.|pty\.|webbrowser\.|ftplib\.|smtplib\.|urllib\.|shutil\."
    r"|socket\.(?:connect|bind|getaddrinfo|gethostbyname|sendto)"
    r"|os\.(?:system|exec|posix_spawn|spawn|startfile|fork|kill|remove|rename|rmdir|mkdir|link|symlink|truncate"
    r"|chmod|chown)"
)


def serve() -> None:
    """Answer requests until standard input ends."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    _redirect(0, os.devnull, os.O_RDONLY)
    _redirect(1, os.devnull, os.O_WRONLY)
    _warm()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = _Watch()
    sys.addaudithook(watch.note)
    print("ready", file=replies)
    for line in requests:
        print(_run(json.loads(line), watch), file=replies)


def _warm() -> None:
    """Import what a run may need and compile the kernel, on the pair that comes with affectlens."""
    import transformers  # noqa: F401  a live model costs seconds otherwise

    import affectlens as al
    import affectlens.checkpoints.hub.listing
    import affectlens.checkpoints.pickles.torch_store
    import affectlens.lens
    from affectlens.cli import main

    demo = al.load_demo()
    base, tuned, control = (side.store.source for side in (demo.base, demo.tuned, demo.control))
    for argv in (["inspect", base], ["diff", base, tuned, "--control", control, "--spectra", "1", "--json"]):
        sys.argv = ["affectlens", *argv]
        main()
    sys.stdout.flush()
    gc.freeze()  # or each run would have what the last ones left searched for garbage, all modules included


class _Watch:
    """An audit hook, which can't be removed, and the log of the run that it notes at present."""

    log: int | None = None

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.log is None:
            return
        if event == "open":
            if not isinstance(args[0], int):
                writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
                self._line("write" if writes else "open", os.fsdecode(args[0]))
        elif _TELLING.match(event):
            self._line(event, *(str(arg)[:500] for arg in args))

    def _line(self, *words: str) -> None:
        assert self.log is not None
        os.write(self.log, json.dumps(words).encode() + b"\n")


def _run(asked: dict[str, Any], watch: _Watch) -> int:
    """Run the command line and return its exit code."""
    from affectlens.cli.process import run

    for number, name in ((1, "out"), (2, "err")):
        _redirect(number, asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    # New ones for each run, with the errors of Python's UTF-8 mode: nothing of a run before is in a buffer.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    sys.argv = ["affectlens", *asked["argv"]]
    _limit(asked["seconds"])
    log = watch.log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    code: Any = 0
    try:
        with warnings.catch_warnings(action="default"):
            sys.warnoptions[:] = ["default"] if asked["warns"] else []  # as PYTHONWARNINGS=default does
            run().leave()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException:  # as at the end of an interpreter: what can't be written is an error
                traceback.print_exc()
                code = code or 120
        watch.log = None
        os.close(log)
    return code if isinstance(code, int) else 1


def _redirect(number: int, path: str, flags: int) -> None:
    file = os.open(path, flags)
    os.dup2(file, number)
    os.close(file)


def _limit(seconds: int) -> None:
    """Limit the time and memory of this run; the hard limits stay, so that the next run can set its own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + seconds)
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no such limit where there is no such file
        return
    _set(resource.RLIMIT_AS, taken + _MEMORY)


def _set(limit: int, most: int) -> None:
    resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))


if __name__ == "__main__":
    serve()
