"""What a diff does when asked for more: units, spectra, alignment, own measures, executors, output."""

import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import affectlens as al
from affectlens.cli import main
from affectlens.drift import parts
from affectlens.drift.measures import BLOCKWISE
from affectlens.errors import CheckpointError, NoSuchSite, TableError
from tests.checkpoints.adapters.test_adapter import bare
from tests.numbers import LANES
from tests.small_models import nudge, tiny
from tests.tiny_models import tiny as tiny_of

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # PEFT has much to say

BASE = tiny("llama")
TUNED = nudge(tiny("llama"), "layers")
OTHER = nudge(tiny("llama"), "layers", seed=5, scale=0.02)

# role → how many units, how long each, along which dimension; 4 heads share 2 of k and v
HEADS = {"q_proj": (4, 8, 0), "k_proj": (2, 8, 0), "v_proj": (2, 8, 0), "o_proj": (4, 8, 1)}
NEURONS = {"gate_proj": (48, 1, 0), "up_proj": (48, 1, 0), "down_proj": (48, 1, 1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base in shards, two tunings, an adapter and its trainables alone."""
    root = tmp_path_factory.mktemp("options")
    found = {name: root / name for name in ("base", "tuned", "other", "adapter")}
    BASE.save_pretrained(found["base"], max_shard_size="20KB")
    TUNED.save_pretrained(found["tuned"])
    OTHER.save_pretrained(found["other"])
    model = get_peft_model(
        tiny("llama"), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    )  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.ones_like(parameter).cumsum(1) / 50)
    model.save_pretrained(found["adapter"])
    found["trainables"] = root / "trainables.pth"
    torch.save({"model": bare(found["adapter"], "llama_model.base_model.model.")}, found["trainables"])
    found["part"] = root / "part.pth"
    up = {f"module.{n}": p.detach() for n, p in TUNED.named_parameters() if "up_proj" in n}
    torch.save({"model": up}, found["part"])
    return found


def weight(model: nn.Module, role: str, layer: int = 0) -> Tensor:
    """A matrix of a live model, in float64."""
    (found,) = (p for n, p in model.named_parameters() if f"layers.{layer}." in n and f"{role}.weight" in n)
    return found.detach().double()


# detail


@pytest.mark.parametrize("role", [*HEADS, *NEURONS])
def test_units_are_slices_of_the_weights(role: str) -> None:
    """A head is rows of q, k, v or columns of o; a neuron a row of gate and up or a column of down."""
    drift = al.diff(BASE, TUNED, detail="heads,neurons", progress=False)
    count, size, dim = (HEADS | NEURONS)[role]
    named = f"model.layers.1.{'self_attn' if role in HEADS else 'mlp'}.{role}.weight"
    (site,) = drift.where(role=role, layer=1).sites
    ask = drift.heads if role in HEADS else drift.neurons

    found = ask(named)

    sides = [weight(side, role, 1) for side in (BASE, TUNED)]
    base, tuned = (torch.stack(side.movedim(dim, 0).split(size)).flatten(1) for side in sides)
    assert list(range(count)) == found.iloc[:, 0].tolist()
    np.testing.assert_allclose((tuned - base).norm(dim=1), found["frobenius"], rtol=LANES)
    np.testing.assert_allclose(base.norm(dim=1), found["base_norm"], rtol=LANES)
    np.testing.assert_allclose(found["frobenius"] / found["base_norm"], found["relative"], rtol=1e-6)
    whole = drift.frame.set_index("parameter").loc[named, "frobenius"]
    assert pytest.approx(whole, rel=LANES) == math.sqrt((found["frobenius"] ** 2).sum())
    for asked in (site, repr(site)):
        pd.testing.assert_frame_equal(found, ask(asked))


def test_units_are_arrays_and_no_objects() -> None:
    """A site's numbers are one float32 array, beside nothing where it has no such parts."""
    frame = al.diff(BASE, TUNED, detail="neurons", progress=False).frame

    cells = frame["unit_frobenius"].dropna()
    assert {np.dtype(np.float32)} == {cell.dtype for cell in cells}
    assert set(NEURONS) == set(frame.loc[cells.index, "role"])


def test_units_that_are_not_there_are_told() -> None:
    """Not asked for, no such site, a site without them, and a word that is no detail."""
    plain, heads = (al.diff(BASE, TUNED, detail=detail, progress=False) for detail in (None, "heads"))

    with pytest.raises(NoSuchSite, match=r"detail='neurons'"):
        plain.neurons("language.0.gate_proj")
    with pytest.raises(NoSuchSite, match=r"0 sites with heads are called language.0.gate_proj"):
        heads.heads("language.0.gate_proj")
    with pytest.raises(NoSuchSite, match=r"Did you mean 'language.0.q_proj'"):
        heads.heads("language.0.q_prj")
    with pytest.raises(TableError, match=r"no detail 'head'.*Did you mean 'heads'"):
        al.diff(BASE, TUNED, detail="head", progress=False)


# spectra


def test_spectra_are_those_of_a_plain_svd() -> None:
    """Values, ranks and overlaps of each matrix against numpy's."""
    frame = al.diff(BASE, TUNED, spectra=3, progress=False).where(layer=0).frame.set_index("role")

    for role in (*HEADS, *NEURONS):
        base, delta = weight(BASE, role).numpy(), (weight(TUNED, role) - weight(BASE, role)).numpy()
        u, values, vt = np.linalg.svd(delta, full_matrices=False)
        w, _, xt = np.linalg.svd(base, full_matrices=False)
        row, shares = frame.loc[role], values / values.sum()
        np.testing.assert_allclose(values[:3], row["singular_values"], rtol=1e-5)
        expected = {
            "spectral_norm": values[0],
            "stable_rank": (values**2).sum() / values[0] ** 2,
            "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
            "overlap_out": (np.square(u[:, :3].T @ w[:, :3])).sum() / 3,
            "overlap_in": (np.square(vt[:3] @ xt[:3].T)).sum() / 3,
            "overlap_out_chance": 3 / base.shape[0],
            "overlap_in_chance": 3 / base.shape[1],
        }
        for name, value in expected.items():
            assert pytest.approx(value, rel=1e-4) == row[name], (role, name)
        assert row["residual"] < 1e-5


def test_vectors_and_what_did_not_move_have_no_spectrum() -> None:
    """Null, and no error."""
    frame = al.diff(BASE, nudge(tiny("llama"), "up_proj"), spectra=2, progress=False).frame

    assert {"up_proj"} == set(frame.loc[frame["spectral_norm"].notna(), "role"])


@pytest.mark.parametrize("asked", [-1, 1.5, True, "3"])
def test_a_number_of_singular_values_that_is_none_is_told(asked: Any) -> None:
    """Before anything odd comes of it."""
    with pytest.raises(TableError, match="spectra must be a whole number, 1 or more"):
        al.diff(BASE, TUNED, spectra=asked, progress=False)


# alignment


def disguised(model: nn.Module) -> nn.Module:
    """The same function: neurons in another order and on other scales."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            mlp = layer.mlp
            order = torch.randperm(48, generator=generator)
            scale = torch.rand(48, generator=generator) + 0.5
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[order] * scale[:, None])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order] / scale)
    return model


def test_alignment_sees_through_a_disguise_and_says_so() -> None:
    """What drifted by √2 has hardly moved once its neurons are matched; a loud finding tells."""
    tuned = disguised(nudge(tiny("llama"), "mlp", scale=1e-4))

    drift = al.diff(BASE, tuned, align=True, progress=False)

    rows = drift.frame[drift.frame["role"].isin(NEURONS)]
    assert rows["relative"].min() > 1
    assert rows["aligned_relative"].max() < 0.01
    assert rows["neurons_moved"].min() > 40
    assert "In 2 of 2 gated MLPs neurons changed place or scale" in " ".join(drift.findings)
    assert drift.by("role").set_index("role").loc["gate_proj", "aligned_relative"] < 0.01
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(tuned(input_ids=ids).logits, BASE(input_ids=ids).logits, rtol=1e-2, atol=1e-2)


def test_alignment_leaves_an_ordinary_tuning_alone() -> None:
    """No neuron moves, both drifts are one, and nothing is said."""
    drift = al.diff(BASE, nudge(tiny("llama"), "mlp", scale=1e-3), align=True, progress=False)

    rows = drift.frame[drift.frame["role"].isin(NEURONS)]
    assert {0} == set(rows["neurons_moved"]) | set(rows["neurons_rescaled"])
    np.testing.assert_allclose(rows["relative"], rows["aligned_relative"], rtol=0.02)
    assert "neurons" not in " ".join(drift.findings)


# measures of one's own


def total(base: Tensor, tuned: Tensor) -> float:
    """Σ |Δ|, as a user would write it."""
    return float((tuned - base).abs().sum())


def test_a_measure_of_one_s_own_is_added_up_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the blocks are; its name is in the origin."""
    whole = al.diff(BASE, TUNED, measures={"total": total}, progress=False)
    monkeypatch.setattr(parts, "PART", 1 << 9)
    monkeypatch.setattr("affectlens.drift.torch_engine.BLOCK", 1 << 6)
    cut = al.diff(BASE, TUNED, measures={"total": total}, progress=False)

    expected = whole.frame["mean_abs"] * whole.frame["size"]
    np.testing.assert_allclose(expected, whole.frame["total"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(expected, cut.frame["total"], rtol=1e-5, atol=1e-6)
    assert ["total"] == whole.origin["custom"]


# executors


class Flaky(Executor):
    """Runs jobs at once; each fails so many times before it works."""

    def __init__(self, failures: int) -> None:
        self.failures, self.tries = failures, dict[Any, int]()

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        done = self.tries[given[0].sites] = self.tries.get(given[0].sites, 0) + 1
        if done <= self.failures:
            future.set_exception(OSError("the worker died"))
        else:
            future.set_result(function(*given, **named))
        return future


@pytest.mark.parametrize("case", ["plain", "control", "adapter", "trainables", "part", "heads", "spectra"])
def test_threads_of_an_executor_give_the_same_table(case: str, folders: dict[str, Path]) -> None:
    """Bit for bit, with findings and ledger, whatever is asked for."""
    tuned = folders[case] if case in folders else folders["tuned"]
    options: dict[str, Any] = {
        "control": {"control": folders["other"], "measures": {"total": total}},
        "trainables": {"alpha": 4},
        "heads": {"detail": "heads,neurons"},
        "spectra": {"spectra": 2, "align": True},
    }.get(case, {})
    alone = al.diff(folders["base"], tuned, progress=False, **options)

    with ThreadPoolExecutor(2) as executor:
        spread = al.diff(folders["base"], tuned, executor=executor, progress=False, **options)

    pd.testing.assert_frame_equal(alone.frame, spread.frame, check_exact=True)
    pd.testing.assert_frame_equal(alone.ledger, spread.ledger)
    assert alone.findings == spread.findings


def test_processes_of_an_executor_give_the_same_table(folders: dict[str, Path]) -> None:
    """Jobs travel to new processes with nothing but paths and sites."""
    given = (folders["base"], folders["adapter"])
    alone = al.diff(*given, control=folders["other"], measures={"total": total}, progress=False)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        spread = al.diff(
            *given, control=folders["other"], measures={"total": total}, executor=executor, progress=False
        )

    pd.testing.assert_frame_equal(alone.frame, spread.frame, check_exact=True)


@pytest.mark.parametrize(("failures", "right"), [(1, True), (2, True), (3, False)])
def test_a_job_is_tried_three_times(failures: int, right: bool, folders: dict[str, Path]) -> None:
    """Two failures are got over, the third is raised."""
    executor, given = Flaky(failures), (folders["base"], folders["tuned"])
    if right:
        found = al.diff(*given, executor=executor, progress=False)

        pd.testing.assert_frame_equal(al.diff(*given, progress=False).frame, found.frame, check_exact=True)
    else:
        with pytest.raises(OSError, match="the worker died"):
            al.diff(*given, executor=executor, progress=False)
    assert min(failures + 1, 3) == max(executor.tries.values())


def test_an_interrupt_takes_back_what_is_waiting(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs that no worker has begun are cancelled."""
    given: list[Future[Any]] = []

    class Waiting(Executor):
        def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
            future: Future[Any] = Future()
            if not given:
                future.set_result(function(*args, **named))
            given.append(future)
            return future

    monkeypatch.setattr("affectlens.drift.diffing.shown", interrupting)
    with pytest.raises(KeyboardInterrupt):
        al.diff(folders["base"], folders["tuned"], executor=Waiting())

    assert len(given) > 2
    assert all(future.cancelled() for future in given[1:])


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ("a module", "is in memory, so the workers of an executor can't open it"),
        ("another alpha", "was opened with its own base or alpha"),
        ("another base", "was opened with its own base or alpha"),
        ("an adapter as base", "was opened with its own base or alpha"),
    ],
)
def test_what_a_worker_would_see_otherwise_is_refused(
    sides: str, message: str, folders: dict[str, Path]
) -> None:
    """Before a wrong number comes of it."""
    base, adapter = folders["base"], folders["adapter"]
    one, two = {
        "a module": lambda: (base, TUNED),
        "another alpha": lambda: (base, al.open_checkpoint(folders["trainables"], base=base, alpha=32)),
        "another base": lambda: (base, al.open_checkpoint(adapter, base=folders["other"])),
        "an adapter as base": lambda: (al.open_checkpoint(adapter, base=base), folders["tuned"]),
    }[sides]()

    with ThreadPoolExecutor(1) as executor, pytest.raises(CheckpointError, match=message):
        al.diff(one, two, executor=executor, progress=False)


def test_a_preset_that_is_not_known_is_told_wherever_it_is_given(folders: dict[str, Path]) -> None:
    """Also for full checkpoints, where none is needed."""
    with pytest.raises(CheckpointError, match="Did you mean 'salmonn'"):
        al.diff(folders["base"], folders["tuned"], preset="salmon", progress=False)


# rounding


def test_the_rounding_column_is_what_casting_a_merge_costs() -> None:
    """‖Δ of the bfloat16 merge − true Δ‖ over what changed is within a fifth of it, for small and large Δ."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = tiny("llama").bfloat16(), tiny("llama").bfloat16()
    true: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "_proj" in name:
                rows, columns = parameter.shape
                b, a = (torch.randn(n, 2, generator=generator) for n in (rows, columns))
                true[name] = (1e-4 if "mlp" in name else 3e-2) * b @ a.T
                parameter.copy_(parameter.float() + true[name])
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())

    frame = al.diff(base, tuned, progress=False).frame.set_index("parameter")

    for name, delta in true.items():
        found = after[name].float() - before[name].float()
        lost = float((found - delta)[found != 0].norm())
        assert pytest.approx(lost, rel=0.2) == frame.loc[name, "rounding"], name


# what happens meanwhile


@contextmanager
def interrupting(total: int, **settings: Any) -> Iterator[Callable[[int], None]]:
    """A progress bar under which Ctrl-C is pressed at the first bytes."""

    def step(count: int) -> None:
        raise KeyboardInterrupt

    yield step


def test_an_interrupt_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends, and its threads with it."""
    monkeypatch.setattr("affectlens.drift.diffing.shown", interrupting)
    monkeypatch.setattr(parts, "PART", 1 << 9)
    before, threads = torch.get_num_threads(), set(threading.enumerate())
    torch.set_num_threads(4)
    try:
        with pytest.raises(KeyboardInterrupt):
            al.diff(BASE, TUNED)
    finally:
        torch.set_num_threads(before)

    assert threads == set(threading.enumerate())


@pytest.mark.parametrize("spread", [False, True])
def test_progress_ends_at_its_total(
    spread: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes, of both sides, alone or spread over workers."""
    counts: list[int] = []

    @contextmanager
    def counting(total: int, **settings: Any) -> Iterator[Callable[[int], None]]:
        counts.append(total)
        yield counts.append

    monkeypatch.setattr("affectlens.drift.diffing.shown", counting)
    with ThreadPoolExecutor(1) as executor:
        al.diff(folders["base"], folders["tuned"], executor=executor if spread else None)

    total_, *read = counts
    assert 2 * 4 * al.open_checkpoint(BASE).parameters == total_ == sum(read)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("what", ["touched", "cut short", "replaced", "removed"])
def test_a_file_that_changes_meanwhile_is_an_error(what: str, suffix: str, tmp_path: Path) -> None:
    """Never a mixed result: 'changed' or 'vanished', with the path."""
    file = tmp_path / f"tuned{suffix}"
    weights = {name: p.detach() for name, p in TUNED.named_parameters()}
    if suffix == ".pth":
        torch.save(weights, file)
    else:
        from safetensors.torch import save_file

        save_file(weights, file)
    done: list[str] = []

    def meddling(base: Tensor, tuned: Tensor) -> float:
        if not done:
            done.append(what)
            if what == "touched":
                os.utime(file, (1, 1))
            elif what == "cut short":
                os.truncate(file, file.stat().st_size // 2)
            elif what == "replaced":
                (tmp_path / "new").write_bytes(file.read_bytes())
                (tmp_path / "new").replace(file)
            else:
                file.unlink()
        return 0.0

    with pytest.raises(CheckpointError, match=r"tuned.*(changed|vanished) while it was read"):
        al.diff(BASE, file, measures={"meddling": meddling}, progress=False)


# output


def drifts(folders: dict[str, Path]) -> dict[str, al.Drift]:
    """Tables with arrays, with nulls, and with nothing that moved."""
    every: dict[str, Any] = {"detail": "heads,neurons", "spectra": 2, "align": True, "progress": False}
    return {
        "full": al.diff(folders["base"], folders["tuned"], control=folders["other"], **every),
        "adapter": al.diff(folders["base"], folders["adapter"], **every),
        "trainables": al.diff(
            folders["base"], folders["trainables"], detail="heads", spectra=2, progress=False
        ),
        "identical": al.diff(folders["base"], folders["base"], **every),
    }


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".csv"])
def test_drifts_come_back_with_their_arrays(suffix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Parquet and JSON hold units and singular values; a CSV leaves them out; numbers keep their digits."""
    for name, drift in drifts(folders).items():
        found = al.Drift.load(drift.save(tmp_path / f"{name}{suffix}"))

        assert drift.sites == found.sites
        assert json.loads(json.dumps(dict(drift.origin))) == dict(found.origin)
        for column in drift.frame:
            expected = drift.frame[column]
            if any(isinstance(cell, np.ndarray) for cell in expected):
                assert (suffix == ".csv") == (column not in found.frame), column
                pairs = zip(expected, found.frame.get(column, expected), strict=True)
                for one, two in pairs:
                    assert isinstance(one, np.ndarray) == isinstance(two, np.ndarray)
                    if isinstance(one, np.ndarray):
                        np.testing.assert_array_equal(one, np.asarray(two, one.dtype))
            elif pd.api.types.is_numeric_dtype(expected):
                one, two = (
                    side[column].to_numpy(float, na_value=np.nan) for side in (drift.frame, found.frame)
                )
                np.testing.assert_array_equal(one, two, err_msg=f"{name} {column}")
        if suffix != ".csv" and name != "identical":
            site = drift.where(role="q_proj").sites[0]
            pd.testing.assert_frame_equal(drift.heads(site), found.heads(site))


@pytest.mark.parametrize("suffix", [".md", ".tex"])
def test_papers_get_tables_without_arrays(suffix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """One line a site, no brackets and no NaN."""
    for name, drift in drifts(folders).items():
        text = drift.save(tmp_path / f"{name}{suffix}").read_text("utf-8")

        assert len(drift) <= text.count("proj") + text.count("norm") + text.count("embed")
        assert "array" not in text
        assert "nan" not in text.lower()


def refuse(literal: str) -> None:
    """NaN and Infinity are no JSON."""
    raise AssertionError(literal)


@pytest.mark.parametrize("tuned", ["tuned", "adapter", "trainables", "base", "part"])
def test_the_command_s_json_is_strict(
    tuned: str,
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One document, whatever is null in it; the ledger is in it and adds up."""
    words = ["diff", str(folders["base"]), str(folders[tuned]), "--json", "--spectra", "2"]
    monkeypatch.setattr("sys.argv", ["affectlens", *words, "--detail", "heads"])
    main()

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    parameters = al.open_checkpoint(BASE).parameters
    assert parameters == sum(row["base_parameters"] for row in found["ledger"])
    assert {"up_proj"} <= {row["role"] for row in found["by"]}


def test_a_model_without_gates_degrades_gracefully() -> None:
    """OPT: no contrast of gate and up, every other table as ever."""
    base = tiny_of("opt").float()

    drift = al.diff(
        base, nudge(tiny_of("opt").float(), "layers"), detail="neurons", align=True, progress=False
    )

    assert {"fc1", "fc2"} <= set(drift.by("role")["role"])
    assert 96 == len(drift.neurons(drift.where(role="fc1", param="weight").sites[0]))
    with pytest.raises(NoSuchSite, match="no language layer has role='gate_proj'"):
        drift.contrast("gate_proj", "up_proj")


def test_a_measure_of_blocks_for_everyone_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in the table gives the same column as one passed to `diff`."""

    def shift(base: Tensor, tuned: Tensor) -> float:
        return float((tuned - base).sum())

    own = al.diff(BASE, TUNED, measures={"shift": shift}, progress=False).frame
    monkeypatch.setitem(BLOCKWISE, "shift", shift)

    for_all = al.diff(BASE, TUNED, progress=False).frame

    assert own["shift"].abs().max() > 0
    pd.testing.assert_frame_equal(own, for_all)
