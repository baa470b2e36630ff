"""The verbs that write checkpoints: what they print, what they write, and their exit codes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import affectlens as al
from affectlens.cli.modifying import numbers
from affectlens.cli.process import run
from affectlens.writing import read_record
from tests.small_models import nudge, tiny

# Sends itself the interrupt when the second block of weights is written.
INTERRUPTED = """
import os, signal, sys
from affectlens.writing import shards
copy, count = shards.copy, []
def interrupted(file, stream, *, start, stop):
    count.append(start)
    if len(count) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    copy(file, stream, start=start, stop=stop)
shards.copy = interrupted
from affectlens.cli import main
main()
"""

FILE = "model.safetensors"
Words = Callable[..., "Ended"]


class Ended(NamedTuple):
    """What a run printed, and how it ended."""

    code: int
    out: str
    told: str


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Words:
    """Run the command line in this process."""

    def ran(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["affectlens", *map(str, arguments)])
        ending = run()
        return Ended(ending.code, capsys.readouterr().out, ending.message)

    return ran


def changed(base: Path, out: Path) -> set[str]:
    """Return the sites whose weights differ from base."""
    one, two = al.open_checkpoint(base), al.open_checkpoint(out)
    return {repr(site) for site in one.sites if not torch.equal(one.read(site), two.read(site))}


def test_transplant_writes_and_tells(pair: tuple[Path, Path], words: Words, tmp_path: Path) -> None:
    """It prints the sites, their share of the model and the folder, which has the donor's bits."""
    base, tuned = pair
    ended = words("transplant", base, tuned, "--role", "gate_proj", "-o", tmp_path / "out")

    assert (0, "") == (ended.code, ended.told)
    assert "Transplant of 2 sites from tuned in base: alpha 1" in ended.out
    assert "language gate_proj      2       3,072" in ended.out
    assert f"Written to {tmp_path / 'out'}." in ended.out
    assert {"language.0.gate_proj", "language.1.gate_proj"} == changed(base, tmp_path / "out")
    donor, found = al.open_checkpoint(tuned), al.open_checkpoint(tmp_path / "out")
    assert all(
        torch.equal(donor.read(site), found.read(site)) for site in donor.sites.where(role="gate_proj")
    )


def test_layers_towers_and_alpha_choose(pair: tuple[Path, Path], words: Words, tmp_path: Path) -> None:
    """Half of the change of one layer's MLP; with --json, it prints the record that is in the folder."""
    base, tuned = pair
    choice = ("--role", "gate_proj,up_proj", "--role", "down_proj", "--tower", "language", "--layers", "1")
    ended = words("transplant", base, tuned, *choice, "--alpha", 0.5, "-o", tmp_path / "out", "--json")

    assert read_record(tmp_path / "out") == json.loads(ended.out)
    assert {f"language.1.{role}" for role in ("gate_proj", "up_proj", "down_proj")} == changed(
        base, tmp_path / "out"
    )
    assert 0.5 == json.loads(ended.out)["interventions"][0]["alpha"]


def test_a_selection_over_towers_is_told(pair: tuple[Path, Path], words: Words, tmp_path: Path) -> None:
    """The vision tower has queries too, so there is a notice, unless --tower names one."""
    told = words("scale", pair[0], "--role", "q_proj", "--factor", 2, "-o", tmp_path / "0")
    one = words(
        "scale", pair[0], "--role", "q_proj", "--tower", "vision", "--factor", 2, "-o", tmp_path / "1"
    )

    assert "The selection spans towers" in told.out
    assert "spans towers" not in one.out
    assert (0, 0) == (told.code, one.code)
    assert all(site.startswith("vision") for site in changed(pair[0], tmp_path / "1"))


def test_zeroed_gates_are_told_to_delete_the_mlp(
    pair: tuple[Path, Path], words: Words, tmp_path: Path
) -> None:
    """Zeroed queries get no such notice."""
    gates = words("zero", pair[0], "--role", "gate_proj", "-o", tmp_path / "0")
    queries = words("zero", pair[0], "--role", "q_proj", "--tower", "language", "-o", tmp_path / "1")

    assert "deletes the MLP" in gates.out
    assert "deletes the MLP" not in queries.out


def test_trainables_are_read_beside_their_base(words: Words, tmp_path: Path) -> None:
    """A file of trained tensors is a donor for its own sites."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    nudge(model, "up_proj")
    kept = {name: tensor for name, tensor in model.state_dict().items() if "up_proj" in name}
    torch.save({"model": kept}, tmp_path / "trained.pth")
    arguments = (tmp_path / "base", tmp_path / "trained.pth", "--role", "up_proj")
    ended = words("transplant", *arguments, "-o", tmp_path / "out")

    assert (0, "") == (ended.code, ended.told)
    assert {"language.0.up_proj", "language.1.up_proj"} == changed(tmp_path / "base", tmp_path / "out")
    assert "are stored in base alone" in ended.out


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_writes_adapters_and_merges(words: Words, tmp_path: Path) -> None:
    """It writes the adapter alone or the whole model; a transplant of untouched sites changes nothing."""
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    source = (tmp_path / "adapter", "--base", tmp_path / "base")

    plain = words("export", *source, "-o", tmp_path / "plain")
    merged = words("export", *source, "-o", tmp_path / "merged", "--merged")
    still = words("transplant", tmp_path / "base", source[0], "--role", "up_proj", "-o", tmp_path / "still")

    assert (0, 0, 0) == (plain.code, merged.code, still.code)
    assert "PEFT adapter of adapter over base: 2 modules, 256 parameters" in plain.out
    assert (tmp_path / "plain" / "adapter_model.safetensors").is_file()
    queries = {"language.0.q_proj", "language.1.q_proj"}
    assert queries == changed(tmp_path / "base", tmp_path / "merged")
    assert "adapter does not touch these sites, so nothing changes" in still.out
    assert set() == changed(tmp_path / "base", tmp_path / "still")


def test_errors_are_told_in_a_line(pair: tuple[Path, Path], words: Words, tmp_path: Path) -> None:
    """Code 1 for a missing site or file, 2 for a usage error; nothing is written."""
    base, tuned = pair
    cases = (
        (1, ("transplant", base, tuned, "--role", "gate"), "no site has role='gate'"),
        (1, ("transplant", base, tuned, "--role", "gate_proj", "--layers", "0-7"), "no site has layer=2"),
        (1, ("transplant", base, tmp_path / "none", "--role", "gate_proj"), "no such file or folder"),
        (1, ("export", tuned, "--base", base), "holds no LoRA factors"),
        (2, ("zero", base), "select sites with --role"),
        (2, ("zero", base, "--layers", "3-1"), "is not a list of layers"),
        (2, ("scale", base, "--role", "gate_proj"), "Missing option"),
    )
    for code, arguments, message in cases:
        ended = words(*arguments, "-o", tmp_path / "out")
        assert (code, "") == (ended.code, ended.out)
        assert message in ended.told
    inside = words("zero", base, "--role", "gate_proj", "-o", base / "out")
    assert (1, True) == (inside.code, "is inside" in inside.told)
    assert [] == list(tmp_path.iterdir())


def test_names_from_files_can_not_speak_to_the_terminal(words: Words, tmp_path: Path) -> None:
    """Escape sequences in folders, tensors and settings are neither printed nor part of an error."""
    evil = "\x1b[31mevil\x1b]0;title\x07"
    for seed, name in enumerate((evil, "tuned" + evil)):
        model = tiny("llama", seed=seed)
        model.config.update({evil: f"{seed}{evil}"})
        model.save_pretrained(tmp_path / name)
        tensors = {f"model.layers.0.{evil}.weight": torch.ones(4, 4), "lm_head.weight": torch.ones(64, 32)}
        save_file({**load_file(tmp_path / name / FILE), **tensors}, tmp_path / name / FILE)
    told = words("transplant", tmp_path / evil, tmp_path / f"tuned{evil}", "-o", tmp_path / f"out{evil}")
    again = words("zero", tmp_path / evil, "--role", "gate_proj", "-o", tmp_path / f"out{evil}")

    assert (0, 1) == (told.code, again.code)
    assert "evil" in told.out
    assert "\x1b" not in told.out + told.told + again.told


def test_layers_are_numbers_and_ranges() -> None:
    """Ranges include both ends; any order and spaces are allowed."""
    assert {10, 11, 12, 23, 5} == numbers("10-12, 23,5")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """After Ctrl-C while weights are written: code 130, one word, and no folder or part of one."""
    out = tmp_path / "new" / "out"
    arguments = ["transplant", str(pair[0]), str(pair[1]), "--role", "gate_proj", "-o", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    assert (130, "", "interrupted\n") == (done.returncode, done.stdout, done.stderr)
    assert [] == list(tmp_path.iterdir())
