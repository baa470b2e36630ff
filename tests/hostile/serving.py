"""The fork server: one process imports the command line once, and each run is a fork of it.

A program of its own, started by `running`. A line of JSON in asks for a run, a line out tells how it ended.
Each fork gets limits, writes its output to files, and an audit hook notes what it opens and starts.
"""

import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_MEMORY = 4 << 30  # bytes of addresses above those that the imports take
# What starts another program, reaches for a network, or changes files.
_TELLING = re.compile(
    r"subprocess\.|pty\.|webbrowser\.|ftplib\.|smtplib\.|urllib\.|shutil\."
    r"|socket\.(?:connect|bind|getaddrinfo|gethostbyname|sendto)"
    r"|os\.(?:system|exec|posix_spawn|spawn|startfile|fork|kill|remove|rename|rmdir|mkdir|link|symlink|truncate"
    r"|chmod|chown)"
)


def serve() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)
    _warm()
    print("ready", file=replies)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(asked)
        code, late = _await(child, began + asked["seconds"])
        print(json.dumps({"code": code, "late": late, "seconds": time.monotonic() - began}), file=replies)


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


def _run(asked: dict[str, Any]) -> None:
    """Be the command line; never returns."""
    from affectlens.cli import main

    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _limit()
    sys.argv = ["affectlens", *asked["argv"]]
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    sys.addaudithook(lambda event, args: _note(log, event, args))
    code: Any = 0
    try:
        main()
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
    os._exit(code if isinstance(code, int) else 1)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no such limit where there is no such file
        return
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))


def _note(log: int, event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        if not isinstance(args[0], int):
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            _line(log, "write" if writes else "open", os.fsdecode(args[0]))
    elif _TELLING.match(event):
        _line(log, event, *(str(arg)[:500] for arg in args))


def _line(log: int, *words: str) -> None:
    os.write(log, json.dumps(words).encode() + b"\n")


def _await(child: int, until: float) -> tuple[int, bool]:
    """The exit code of a fork, and whether its time ran out."""
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL, True


if __name__ == "__main__":
    serve()
