"""How a run ends: exit codes 0, 1, 2 and 130, a few lines on standard error, never a traceback."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from safetensors.torch import save_file

from tests.evil_names import EVIL

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
MAIN = [sys.executable, "-m", "affectlens"]
# Runs the command line with a verb of which a test has made something else.
BROKEN = """
import hashlib, logging, os, signal, sys, threading, time, warnings
from affectlens.cli import main
import affectlens.cli.verbs
import affectlens.checkpoints as checkpoints
def look(source):
    {}
checkpoints.look = look
sys.argv = ["affectlens", "inspect", "x"]
main()
"""
# Ctrl-C reaches the process so many seconds after it began to listen.
LATER = """
import os, signal, sys, threading, time
def strike():
    time.sleep({})
    os.kill(os.getpid(), signal.SIGINT)
from affectlens import cli
listen = cli.listen
cli.listen = lambda: [listen(), threading.Thread(target=strike, daemon=True).start()]
cli.main()
"""


def broken(body: str, **env: str) -> tuple[int, str, str]:
    """Return the code, output and error of `inspect`, with `look` replaced by this body."""
    run = subprocess.run(
        [sys.executable, "-c", BROKEN.format(body)],
        capture_output=True,
        text=True,
        env={**ENV, **env},
        timeout=120,
    )
    return run.returncode, run.stdout, run.stderr


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a pair whose spectra take some seconds, mostly inside calls into C."""
    folders = tuple(tmp_path_factory.mktemp("slow") / side for side in ("base", "tuned"))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1600, 1600, generator=generator)
    for number, folder in enumerate(folders):
        folder.mkdir()
        moved = base + 0.01 * number * torch.randn(1600, 1600, generator=generator)
        names = [
            f"model.layers.{layer}.mlp.{role}_proj.weight"
            for layer in range(2)
            for role in ("gate", "up", "down")
        ]
        save_file({name: moved.clone() for name in names}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return folders[0], folders[1]


OURS = "from affectlens.errors import NoSuchSite; raise NoSuchSite('none\\n\\x1b[31m here')"
STARVED = "not enough memory for this"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (OURS, "none �[31m here"),
        ("open('/no/such/folder')", "/no/such/folder: No such file or directory"),
        ("raise MemoryError", STARVED),
        ('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', STARVED),
    ],
)
def test_an_error_is_one_line(body: str, expected: str) -> None:
    """Errors of affectlens, of the system and of memory: code 1 and an empty standard output."""
    assert (1, "", f"error: {expected}\n") == broken(body)


def test_a_fault_of_ours_is_reported_as_one() -> None:
    """Two lines: the error with its place, and how to see the traceback, which AFFECTLENS_DEBUG=1 shows."""
    code, output, told = broken("{}['a\\x1b[31m\\nb']")

    assert (1, "", 2) == (code, output, len(told.splitlines()))
    assert "error: internal error: KeyError: 'a\\x1b[31m\\nb' (<string>, line 7)" in told
    assert "AFFECTLENS_DEBUG=1" in told
    assert "Traceback" in broken("{}['a']", AFFECTLENS_DEBUG="1")[2]


def test_libraries_are_not_heard() -> None:
    """Their warnings and logs would look like a part of the error."""
    body = """
    warnings.warn("a library warns")
    logging.getLogger("transformers").error("a library logs")
    from affectlens.errors import TableError
    raise TableError("ours")
    """
    assert (1, "", "error: ours\n") == broken(body)


@pytest.mark.parametrize("name", [EVIL[at] for at in (1, 10, 11, 12, 15, 23, -2, -1)], ids=range(8))
def test_a_name_given_on_the_command_line_is_told_plainly(name: str, tmp_path: Path) -> None:
    """One printable line for any name, which begins with the path, and is not too long."""
    path = f"{tmp_path}/{name[:50_000]}"
    run = subprocess.run([*MAIN, "inspect", path], capture_output=True, env=ENV, timeout=120)
    told = run.stderr.decode("utf-8")

    assert (1, b"", 1) == (run.returncode, run.stdout, len(told.splitlines()))
    assert told.startswith(f"error: {tmp_path}/"[:60])
    assert told.removesuffix("\n").isprintable()
    assert 1100 > len(told)


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    """A folder name that is not UTF-8 is an ordinary error."""
    run = subprocess.run(
        [*MAIN, "inspect", os.fsencode(tmp_path) + b"/\xff\xfe"], capture_output=True, env=ENV
    )

    assert (1, b"") == (run.returncode, run.stdout)
    assert "no such file or folder" in run.stderr.decode("utf-8")


@pytest.mark.parametrize(
    "words", [("diff", "one"), ("nope",), ("inspect", "--nope"), ("inspect", "a", "b\x1b[31m")]
)
def test_usage_is_code_2(words: tuple[str, ...]) -> None:
    """Three lines, without the escape sequences of an argument."""
    run = subprocess.run([*MAIN, *words], capture_output=True, text=True, env=ENV)

    assert (2, "", 3) == (run.returncode, run.stdout, len(run.stderr.splitlines())), run.stderr
    assert "\x1b" not in run.stderr
    assert "Usage: affectlens" in run.stderr


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_reader_that_has_read_enough_is_no_error(words: tuple[str, ...], pair: tuple[Path, Path]) -> None:
    """`| head -1`: no message, whether it closes the pipe before or during the output."""
    for lines in (0, 1):
        with subprocess.Popen([*MAIN, "inspect", pair[0], *words], stdout=PIPE, stderr=PIPE, env=ENV) as run:
            assert run.stdout is not None
            assert run.stderr is not None
            for _ in range(lines):
                run.stdout.readline()
            run.stdout.close()
            assert b"" == run.stderr.read()
        assert 0 == run.returncode


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_is_full_is_an_error(pair: tuple[Path, Path]) -> None:
    """The error is printed once, not again when Python exits."""
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*MAIN, "inspect", pair[0]], stdout=full, stderr=subprocess.PIPE, env=ENV, text=True
        )

    assert (1, "error: No space left on device\n") == (run.returncode, run.stderr)


@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_an_output_that_has_no_such_characters_gets_others(
    env: dict[str, str], pair: tuple[Path, Path]
) -> None:
    """With ASCII only, the table has `?` for other characters."""
    run = subprocess.run([*MAIN, "diff", *pair], capture_output=True, env={**ENV, **env})

    assert (0, b"") == (run.returncode, run.stderr)
    assert b"gate_proj" in run.stdout
    assert run.stdout.isascii()


def test_closed_streams_are_no_error(pair: tuple[Path, Path]) -> None:
    """With standard streams closed, the exit code is still right."""
    codes = [
        subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *MAIN, "inspect", source], env=ENV).returncode
        for closed in (">&-", "2>&-", ">&- 2>&-")
        for source in (pair[0], "none")
    ]

    assert [0, 1] * 3 == codes


@pytest.mark.parametrize(
    "words", [("diff", "none", "none"), ("inspect", "none"), ("diff", "PAIR", "PAIR", "--by", "nope")]
)
def test_json_is_all_or_nothing(words: tuple[str, ...], pair: tuple[Path, Path]) -> None:
    """An error leaves standard output empty."""
    words = tuple(str(pair[0]) if word == "PAIR" else word for word in words)
    run = subprocess.run([*MAIN, *words, "--json"], capture_output=True, text=True, env=ENV)

    assert (1, "", 1) == (run.returncode, run.stdout, len(run.stderr.splitlines()))


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.1, 0.3, 0.7, 1.5, 3.0])
def test_an_interrupt_ends_at_any_moment(moment: float, slow: tuple[Path, Path], tmp_path: Path) -> None:
    """During imports, reading and calls into C: code 130 within five seconds, one word, no partial file."""
    words = ["diff", *map(str, slow), "--spectra", "300", "-o", str(tmp_path / "drift.parquet")]
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", LATER.format(moment), *words], capture_output=True, text=True, env=ENV
    )

    assert (130, "", "interrupted\n") == (run.returncode, run.stdout, run.stderr)
    assert moment + 6 > time.monotonic() - began
    assert [] == list(tmp_path.iterdir())


def test_an_interrupt_from_outside_ends_everything(slow: tuple[Path, Path]) -> None:
    """Ctrl-C from outside leaves no process behind."""
    command = [*MAIN, "diff", *slow, "--spectra", "300"]
    with subprocess.Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, env=ENV, start_new_session=True
    ) as run:
        time.sleep(random.Random(0).uniform(1.5, 2.5))
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        told = run.communicate()

    assert (130, ("", "interrupted\n")) == (run.returncode, told)
    assert 5 > time.monotonic() - began
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


@pytest.mark.parametrize(
    "body",
    [
        "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2_000_000_000)",
        "while True:\n        try: time.sleep(0.1)\n        except KeyboardInterrupt: pass",
        "try: time.sleep(60)\n    except KeyboardInterrupt: raise ImportError('numpy') from None",
    ],
    ids=["held up in C", "swallowed", "disguised"],
)
def test_an_interrupt_ends_what_does_not_hear_it(body: str) -> None:
    """It ends even if a library delays the exception, swallows it or replaces it."""
    began = time.monotonic()
    code, output, told = broken(
        f"threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n    {body}"
    )

    assert (130, "", "interrupted\n") == (code, output, told)
    assert 8 > time.monotonic() - began


def test_an_unusual_end_keeps_its_code() -> None:
    """A library that exits by itself keeps its exit code."""
    assert 7 == broken("sys.exit(7)")[0]


def test_output_is_json_for_any_name(tmp_path: Path) -> None:
    """Each tensor is one line of JSON, whatever its name."""
    names = [name for name in EVIL if name]
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    run = subprocess.run([*MAIN, "inspect", tmp_path, "--json"], capture_output=True, text=True, env=ENV)

    assert (0, "") == (run.returncode, run.stderr)
    assert set(names) == {json.loads(line)["disk"] for line in run.stdout.splitlines()}
