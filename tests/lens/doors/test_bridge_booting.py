"""A boot starts no subprocess, opens no connection, and leaves the interpreter as it was."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from affectlens.errors import MissingExtra
from affectlens.interventions import Scale
from affectlens.lens.doors.booting import adapter_of, boot
from affectlens.lens.doors.bridge import bridge
from tests.lens.doors.test_bridge import NEEDS_TORCHVISION, bridged, eager, of
from tests.lens.families import BY_NAME

ROOT = Path(__file__).parents[3]

# Everything that starts a program or looks for another machine, as the interpreter itself reports it.
GUARDED = """
import sys
import torch, transformers  # what their own imports look for is not what is asked here

def guard(event, args):
    if event.partition(".")[0] in ("subprocess", "pty", "socket") or event in (
        "os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn", "os.posix_spawn", "os.startfile",
    ):
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(guard)
"""
BOOTED = """
import affectlens as al
from affectlens.errors import MissingExtra
from affectlens.interventions import Scale
from affectlens.lens.doors.bridge import bridge, bridge_input
from tests.lens.families import BY_NAME, base

for name in ("qwen2_5_omni", "smolvlm"):
    lens, batch = al.Lens(base(name)), BY_NAME[name].batch()
    points = lens.sites.where(tower="language", role="gate_proj").at("pre_activation")
    built = bridge(lens, Scale(points, factor=2.0))
    built(**bridge_input(built, batch))
    built.run_with_cache(**bridge_input(built, batch))
demo = al.load_demo()
lens = al.load(demo.base)
built = bridge(lens)
built(**bridge_input(built, lens.prepare(*demo.task("faces-unseen").examples[:2])))
built("so happy")
try:
    bridge(al.Lens(base("qwen2_5_vl")))
except MissingExtra:
    print("done", "torchvision" in sys.modules)
"""


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter where no program can be started and no address looked up."""
    # A hub that could be asked: only what is never asked passes.
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", GUARDED + code]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_no_program_is_started_and_no_address_looked_up() -> None:
    """Booting, running and caching several families does neither, and asks for no torchvision."""
    run = child(BOOTED)

    assert (0, "done False") == (run.returncode, run.stdout.strip()), run.stderr[-2000:]


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "import urllib.request; urllib.request.urlopen('http://localhost:9')",
    ],
)
def test_the_guard_sees_what_it_is_there_for(code: str) -> None:
    """The same interpreter does notice a program that is started, and an address that is looked up."""
    run = subprocess.run(
        [sys.executable, "-c", GUARDED.replace("import torch, transformers", "") + code],
        capture_output=True,
        text=True,
    )

    assert 1 == run.returncode
    assert "RuntimeError" in run.stderr or "URLError" in run.stderr


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was to be started, and was not."""
    found: list[Any] = []

    def note(*args: Any, **_: Any) -> None:
        found.append(args)
        raise OSError("nothing is started here")

    for owner, names in (
        (subprocess, ("Popen", "run", "call", "check_call", "check_output")),
        (os, ("system", "execv", "execve", "execvp", "execvpe", "posix_spawn", "posix_spawnp", "fork")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, note)
    return found


def test_what_transformerlens_does_by_itself_would_install(started: list[Any], tmp_path: Path) -> None:
    """Its own boot, which is not called here, runs pip where a processor can't be loaded."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    config = SimpleNamespace(is_multimodal=True)
    helpers.load_modality_processor(
        SimpleNamespace(), config, str(tmp_path), trust_remote_code=False, token=None
    )

    assert "torchvision" in started[0][0]


@pytest.mark.parametrize("name", ["gemma3", "internvl", "qwen2_5_omni"])
def test_nothing_is_to_be_started(name: str, started: list[Any]) -> None:
    """A boot does not even try, where a lens has no processor and torchvision is missing."""
    bridged(bridge(eager(name), Scale(of(eager(name), "o_proj").at("output"), factor=2.0)), name)

    assert [] == started


@pytest.mark.parametrize("name", NEEDS_TORCHVISION)
def test_a_refusal_starts_nothing(name: str, started: list[Any]) -> None:
    """What is missing is told, not fetched."""
    with pytest.raises(MissingExtra):
        bridge(eager(name))

    assert [] == started


def test_the_installer_is_out_while_a_bridge_is_built(started: list[Any]) -> None:
    """An adapter that asks for it meanwhile gets nothing; afterwards it is TransformerLens's again."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    before, found = helpers._ensure_torchvision, []
    model = BY_NAME["llama"].build()
    adapt = adapter_of(model)

    def asking(config: Any) -> Any:
        found.append(helpers._ensure_torchvision())
        return adapt(config)

    boot(model, asking)

    assert ([False], []) == (found, started)
    assert before is helpers._ensure_torchvision


def test_loggers_and_filters_are_as_before() -> None:
    """TransformerLens silences transformers when it is imported; not for those who import affectlens."""
    level, filters = logging.getLogger("transformers").level, list(warnings.filters)
    bridge(eager("llama"))

    assert (level, filters) == (logging.getLogger("transformers").level, list(warnings.filters))
