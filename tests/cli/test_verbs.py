"""The command line as a new user sees it: tables, or one clear line when something is wrong."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import affectlens as al
from affectlens.errors import LensError
from tests.hostile.running import Server
from tests.small_models import tiny
from tests.tiny_models import tiny as zoo_tiny

TASKS = Path(al.__file__).parent / "demo" / "tasks"
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def affectlens(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the command in the warm process; how a process starts and ends is tested in `test_process`."""

    def ran(*words: object) -> "subprocess.CompletedProcess[str]":
        argv = [*map(str, words)]
        found = server.run(argv, tmp_path_factory.mktemp("run") / "output", warns=True)
        return subprocess.CompletedProcess(argv, found.code, found.out, found.err)

    return ran


def started(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "affectlens", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV)


def test_diff_prints_the_role_table_and_the_ledger(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Both are printed, and pandas reads the Parquet file."""
    run = started("diff", *pair, "-o", tmp_path / "drift.parquet")

    assert (0, "") == (run.returncode, run.stderr)
    assert "gate_proj" in run.stdout
    assert "compared, equal in every value" in run.stdout
    frame = pd.read_parquet(tmp_path / "drift.parquet")
    assert al.open_checkpoint(pair[0]).parameters == frame["size"].sum()


def test_diff_as_json_is_strict(affectlens: Run, pair: tuple[Path, Path]) -> None:
    """The output is one JSON document without NaN literals."""
    run = affectlens("diff", *pair, "--json", "--by", "role")

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    found = json.loads(run.stdout, parse_constant=refuse)
    assert {"by", "ledger", "findings", "origin"} == set(found)
    assert "gate_proj" in {row["role"] for row in found["by"]}


def test_inspect_says_what_a_checkpoint_is(affectlens: Run, pair: tuple[Path, Path]) -> None:
    """Type, size, coverage and the tree as text; with --json, one record per tensor."""
    told, listed = affectlens("inspect", pair[0]), affectlens("inspect", pair[0], "--json")

    assert "100.0% of the parameters have a role" in told.stdout
    assert "    gate_proj" in told.stdout
    records = [json.loads(line) for line in listed.stdout.splitlines()]
    assert len(al.open_checkpoint(pair[0]).laid) == len(records)
    expected = "disk mem tower stack layer role param fused expert block transposed shape dtype"
    assert expected.split() == list(records[0])


def test_inspecting_two_thousand_tensors_takes_no_two_seconds(tmp_path: Path) -> None:
    """In processor time with imports, which include neither torch nor transformers."""
    names = ("gate_proj", "up_proj", "down_proj")
    layers = (
        f"model.layers.{n}.mlp.experts.{e}.{name}.weight"
        for n in range(112)
        for e in range(6)
        for name in names
    )
    save_file({name: torch.zeros(2, 2) for name in layers}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    code = (
        "import sys, time; from affectlens.cli import main\n"
        "main()\n"
        "print(time.process_time(), [m for m in ('torch', 'transformers') if m in sys.modules])"
    )

    run = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path)], capture_output=True, text=True, check=True
    )

    seconds, heavy = run.stdout.splitlines()[-1].split(maxsplit=1)
    assert "in 2016 tensors" in run.stdout
    assert ("[]", True) == (heavy, float(seconds) < 2)


def test_inspect_verifies_on_the_live_model(affectlens: Run, pair: tuple[Path, Path]) -> None:
    """The forward pass confirms every claim about the base."""
    run = affectlens("inspect", pair[0], "--verify")

    assert 0 == run.returncode, run.stderr
    assert re.search(r"(\d+) claims: \1 confirmed, 0 refuted, 0 unverified", run.stdout)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_inspect_shows_an_adapter(affectlens: Run, save: Callable[..., Path], tmp_path: Path) -> None:
    """It shows rank, targets, scale and the sites the adapter can change, from its own files."""
    peft = pytest.importorskip("peft")
    model = tiny("qwen2")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "q_proj"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")

    told, listed = (affectlens("inspect", tmp_path / "adapter", *more) for more in ((), ("--json",)))

    assert "4, alpha 8, scale 2" in told.stdout
    assert "gate_proj, q_proj" in told.stdout
    records = [json.loads(line) for line in listed.stdout.splitlines()]
    assert {("gate_proj", "lora_A"), ("gate_proj", "lora_B"), ("q_proj", "lora_A"), ("q_proj", "lora_B")} == {
        (record["role"], record["lora"]) for record in records
    }
    assert {0, 1} == {record["layer"] for record in records}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_inspect_shows_an_adapter_of_stacked_experts(affectlens: Run, tmp_path: Path) -> None:
    """PEFT does not store the names of bare parameters: they are counted and have no role."""
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=names, rank_pattern={"q_proj": 4}
    )
    peft.get_peft_model(zoo_tiny("mixtral"), settings).save_pretrained(tmp_path)

    run = affectlens("inspect", tmp_path / "adapter_model.safetensors")

    assert 0 == run.returncode, run.stderr
    assert "mlp.experts.down_proj, mlp.experts.gate_up_proj" in run.stdout
    assert "rank_pattern: {'q_proj': 4}" in run.stdout
    assert re.search(r"other +4 sites", run.stdout)


def test_errors_are_one_line(
    affectlens: Run, pair: tuple[Path, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    """A wrong path, a folder without a checkpoint, and unrelated models: one line and code 1."""
    stranger = save(tiny("llava", seed=5), "stranger")
    other = save(tiny("gemma2", hidden_size=16, head_dim=4), "other")
    cases = (
        (pair[0], tmp_path / "none", "no such file or folder"),
        (pair[0], "none/such", "no such file or folder, not in the hub's cache either"),
        (pair[0], tmp_path, "no checkpoint here"),
        (pair[0], other, "Is this the right base?"),
        (pair[0], stranger, "is probably not the base of stranger"),
    )
    for base, tuned, message in cases:
        run = affectlens("diff", base, tuned)
        assert (1, "", 1) == (run.returncode, run.stdout, len(run.stderr.splitlines())), run.stderr
        assert message in run.stderr


def test_usage_errors_have_code_2(affectlens: Run) -> None:
    """The parser reports a missing argument."""
    run = affectlens("diff", "one")

    assert 2 == run.returncode
    assert "Missing argument" in run.stderr


def test_names_from_files_can_not_speak_to_the_terminal(affectlens: Run, tmp_path: Path) -> None:
    """Escape sequences in a tensor name, a config or a folder are neither printed nor part of an error."""
    import torch
    from safetensors.torch import save_file

    evil = "\x1b[31mevil\x1b]0;title\x07"
    folder = tmp_path / evil
    folder.mkdir()
    save_file({f"model.layers.0.{evil}.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": evil}), "utf-8")

    for words in (("inspect", folder), ("diff", folder, folder), ("diff", folder, tmp_path / f"{evil}2")):
        run = affectlens(*words)
        assert "evil" in run.stdout + run.stderr
        assert "\x1b" not in run.stdout + run.stderr


def test_sweep_study_and_report(affectlens: Run, tmp_path: Path) -> None:
    """The verbs pass tables to each other, here on a small task."""
    home = Path(al.__file__).parent / "demo"
    lines = (home / "tasks" / "sentences.jsonl").read_text("utf-8").splitlines()[::12]
    (tmp_path / "few.jsonl").write_text("\n".join(lines), "utf-8")
    pair = (home / "base", home / "tuned")
    few = f"labels={tmp_path / 'few.jsonl'}"

    swept = started("sweep", *pair, "--task", few, "--n-random", 1, "-o", tmp_path / "effects.parquet")
    assert 0 == swept.returncode, swept.stderr
    affectlens("diff", *pair, "-o", tmp_path / "drift.parquet")
    told = affectlens(
        "report", tmp_path / "drift.parquet", tmp_path / "effects.parquet", "-o", tmp_path / "r.html"
    )
    assert 0 == told.returncode, told.stderr
    assert 100_000 < (tmp_path / "r.html").stat().st_size

    studied = started("study", *pair, "--task", few, "--n-random", 1, "--out", tmp_path / "study")
    assert 0 == studied.returncode, studied.stderr
    assert {"drift.parquet", "effects.parquet", "report.html"} == {
        f.name for f in (tmp_path / "study").iterdir()
    }


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("effects.nope", "effects.nope: can't write '.nope'. Kinds: .parquet"),
        ("/dev/null/effects.parquet", "effects.parquet: can't be written: its folder is read-only or a file"),
    ],
)
def test_what_can_not_be_written_is_told_before_the_work(
    affectlens: Run, output: str, expected: str, pair: tuple[Path, Path]
) -> None:
    """A wrong suffix or folder is an error before the work begins."""
    run = affectlens("diff", *pair, "-o", output)

    assert (1, "", 1) == (run.returncode, run.stdout, len(run.stderr.splitlines())), run.stderr
    assert expected in run.stderr


@pytest.mark.parametrize("task", ["few.jsonl", "emotions=few.jsonl", "labels=none.jsonl"])
def test_wrong_tasks_are_told(affectlens: Run, task: str, pair: tuple[Path, Path]) -> None:
    """A missing kind, an unknown kind and a missing file: one line each."""
    run = affectlens("sweep", *pair, "--task", task)

    assert 1 == run.returncode
    assert 1 == len(run.stderr.splitlines()), run.stderr


def test_evaluate_prints_scores_and_saves_the_answers(
    affectlens: Run, demo: al.Demo, lens: al.Lens, tmp_path: Path
) -> None:
    """The line is that of the library; several tasks don't fit into one table."""
    task, out = TASKS / "sentences.jsonl", tmp_path / "answers.csv"
    words = ("evaluate", demo.base.store.source, "--dtype", "float32", "--batch-size", 7, "-o", out)
    run = affectlens(*words, "--task", f"labels={task}")
    expected = al.evaluate(lens, al.load_task("labels", task))

    assert (0, "") == (run.returncode, run.stderr)
    assert run.stdout.splitlines()[0] == expected.summary
    assert al.Scores.load(out).frame["prediction"].tolist() == expected.frame["prediction"].tolist()
    both = affectlens(*words, "--task", f"a:labels={task}", "--task", f"b:labels={task}")
    assert (both.returncode, both.stderr) == (
        1,
        "error: --output holds the answers to one task, but 2 were given\n",
    )


def test_the_device_is_that_of_the_option_or_the_environment(
    affectlens: Run, demo: al.Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option wins; a device that is not there is a clear error."""
    words = ("evaluate", demo.base.store.source, "--task", f"labels={TASKS / 'sentences.jsonl'}")
    run = affectlens(*words, "--device", "meadow")

    assert run.returncode == 1
    assert run.stderr.startswith("error: the model can't be put on the device 'meadow': ")
    monkeypatch.setenv("AFFECTLENS_DEVICE", "nowhere")
    with pytest.raises(LensError, match="the device 'nowhere'"):
        al.load(demo.base)
    assert al.load(demo.base, device="cpu").device.type == "cpu"


def test_the_version_is_that_of_the_package(affectlens: Run) -> None:
    """One line, without a verb."""
    run = affectlens("--version")

    assert (0, f"affectlens {al.__version__}\n", "") == (run.returncode, run.stdout, run.stderr)
