"""The benchmark runs, and all of its contestants compute the same numbers; no time is measured here."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from warnings import catch_warnings

import pytest
from numpy.testing import assert_allclose
from safetensors import safe_open

from affectlens.drift.blocks import BLOCK
from benchmarks.diff import contestants, lora
from benchmarks.diff.accuracy import worst
from benchmarks.diff.generating import INDEX, LAYOUTS, generate, size
from tests.numbers import LANES

LINES = (
    "read floor, 1 MiB, all changed",
    "read floor, 16 MiB, gate only",
    "diff / read floor, all changed",
    "diff / read floor, gate only",
    "the same measures over safe_open / diff, all changed",
    "a loop for two norms / diff, gate only",
    "from_pretrained and the loop / diff, all changed",
    "diff, gate only / all changed",
    "diff, one thread / two",
    "engine, first use of an installation (compiles)",
    "worst relative error of frobenius",
    "worst relative error of base_norm",
    "LoRA r=16, norm: B·A made / from factors",
    "LoRA r=64, rows: B·A made / from factors",
)
TUNINGS = ("all", "gate", "patches")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate a small base and its tunings, in several shards."""
    found = tmp_path_factory.mktemp("benchmark")
    generate(found / "small", LAYOUTS["small"], tunings=TUNINGS, shard=100_000)
    return found


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """Return the folder of the checkpoints."""
    return folder / "small"


def test_the_benchmark_prints_every_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m benchmarks.diff` succeeds and prints a measurement in each of its lines."""
    arguments = ["--size", "small", "--folder", str(folder), "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.diff", *arguments])
    runpy.run_module("benchmarks.diff", run_name="__main__")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {line[0].removeprefix("| "): line[1] + line[2] for line in lines}

    assert [] == [line for line in LINES if not found.get(line)]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_same_measures_agree(small: Path, tuning: str) -> None:
    """The pass in torch finds the measures of `diff`, for every tensor."""
    ours = contestants.ours(small / "base", small / tuning)
    found = contestants.measures(small / "base", small / tuning)

    assert ours.keys() == found.keys()
    for name, expected in found.items():
        assert list(expected) == list(ours[name])
        assert_allclose(list(ours[name].values()), list(expected.values()), rtol=LANES, atol=1e-12)


@pytest.mark.parametrize("contestant", [contestants.loop, contestants.loaded])
def test_the_loops_agree(small: Path, contestant: Callable[[Path, Path], contestants.Found]) -> None:
    """The loops find the same norm of the change, up to the rounding of a difference in bf16."""
    ours = contestants.ours(small / "base", small / "all")
    found = contestant(small / "base", small / "all")

    assert ours.keys() == found.keys()
    for name, expected in found.items():
        assert_allclose(ours[name]["frobenius"], expected["frobenius"], rtol=2e-3)


def test_the_floor_reads_every_byte(small: Path) -> None:
    """The read floor reads all bytes of both sides."""
    sides = small / "base", small / "all"
    total = sum(file.stat().st_size for side in sides for file in contestants.files(side))

    assert total > 2 * size(LAYOUTS["small"])
    assert {total} == {contestants.floor(*sides, block=block) for block in (4096, BLOCK)}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_tunings_change_what_they_say(small: Path, tuning: str) -> None:
    """The tunings move every tensor, the gates alone, or about half of each large tensor."""
    rows = contestants.ours(small / "base", small / tuning)
    moved = {name for name, row in rows.items() if row["changed"]}
    gates = {name for name in rows if "gate_proj" in name}

    assert 2 == len(gates)
    if tuning != "patches":
        assert (gates if tuning == "gate" else rows.keys()) == moved
    else:
        assert 0.4 < rows["lm_head.weight"]["changed"] / (512 * 64) < 0.6


def test_generating_again_writes_nothing(small: Path) -> None:
    """Existing checkpoints are used again; they have shards and the metadata that transformers needs."""
    file = small / "base" / INDEX
    before = file.stat().st_mtime_ns
    generate(small, LAYOUTS["small"], tunings=TUNINGS, shard=100_000)

    assert before == file.stat().st_mtime_ns
    assert 4 == len(contestants.files(small / "base"))
    with safe_open(contestants.files(small / "base")[0], "pt") as opened:
        assert {"format": "pt"} == opened.metadata()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_norms_are_as_exact_as_float64(small: Path, tuning: str) -> None:
    """The relative error of every norm is below 1e-6."""
    errors = worst(small / "base", small / tuning)

    assert ["frobenius", "base_norm"] == list(errors)
    assert 1e-6 > max(errors.values())


@pytest.mark.parametrize("kind", ["norm", "rows"])
def test_factors_give_what_the_product_gives(kind: str) -> None:
    """Norms from LoRA's factors equal those of B·A."""
    calls = lora.contestants(4, (48, 40))
    found = calls[f"{kind} from factors"]()

    assert_allclose(calls[f"{kind} made"](), found, rtol=1e-5)


def test_the_benchmark_of_the_lens_prints_every_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m benchmarks.lens` succeeds, and each edit by hand gives the same bits as ours."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.lens", "--size", "small", "--repeats", "1"])
    with catch_warnings(action="ignore"):
        runpy.run_module("benchmarks.lens", run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]

    assert 4 + 2 == sum(any(character.isdigit() for character in line.split("|")[2]) for line in lines)
