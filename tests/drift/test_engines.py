"""The engines agree with float64 and with each other; blocks and threads change nothing."""

import math
import os
import platform
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.memory import MemoryStore
from affectlens.drift import blocks, parts, streaming, torch_engine
from affectlens.drift.measures import BESIDE, FIELDS, Engine
from tests.numbers import LANES

ENGINES: dict[str, Engine] = {
    "compiled": streaming.engine(),
    "torch": torch_engine,
}  # torch's alone on an old processor
WORDS = {torch.bfloat16: np.uint32, torch.float16: np.int32, torch.float32: np.uint64}
COUNTED = ["max_abs", "changed", "sign_flips"]
SUMMED = ["frobenius", "base_norm", "relative", "rms", "mean_abs", "rounding"]
CHANGES = ("all", "a tenth", "one block", "none")


def example(dtype: torch.dtype, change: str, *, size: int = 40_000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator).to(dtype)
    delta = 0.01 * torch.randn(size, generator=generator)
    keep = {
        "all": torch.ones(size, dtype=torch.bool),
        "a tenth": torch.rand(size, generator=generator) < 0.1,
        "one block": torch.arange(size) // 1000 == 7,
        "none": torch.zeros(size, dtype=torch.bool),
    }[change]
    return base, torch.where(keep, base.float() + delta, base.float()).to(dtype)


def words(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy().view(WORDS[tensor.dtype])


def exact(base: Tensor, tuned: Tensor) -> dict[str, float]:
    b, t = base.double(), tuned.double()
    d = t - b
    power = torch.ldexp(torch.ones_like(t), torch.frexp(t).exponent - 1) * (t != 0) * (d != 0)
    return {
        "dd": float(d @ d), "bb": float(b @ b), "bd": float(b @ d), "absolute": float(d.abs().sum()),
        "steps": float(power @ power), "largest": float(d.abs().max()), "changed": float((d != 0).sum()),
        "sign_flips": float((b * t < 0).sum()),
    }  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_sums_are_those_of_float64(engine: Engine, dtype: torch.dtype, change: str) -> None:
    """Up to the rounding of float32 lanes for what is summed, exactly for what is counted."""
    base, tuned = example(dtype, change)
    found = np.zeros(len(FIELDS))

    engine.measure((words(base), words(tuned)), found)

    expected = exact(base, tuned)
    tolerance = {name: LANES * abs(value) for name, value in expected.items()}
    tolerance["bd"] = LANES * math.sqrt(expected["bb"] * expected["dd"])  # Σ|b·d| is at most that
    for name, value in zip(FIELDS, found, strict=True):
        exactly = name in ("changed", "sign_flips", "largest")
        assert pytest.approx(expected[name], abs=0 if exactly else tolerance[name], rel=0) == value, name


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_a_side_known_to_be_equal_has_the_same_sums(engine: Engine, dtype: torch.dtype) -> None:
    """Not reading the second side changes no digit."""
    base, _ = example(dtype, "none")
    one, two = np.zeros(len(FIELDS)), np.zeros(len(FIELDS))

    engine.still(words(base), one)
    engine.measure((words(base), words(base.clone())), two)

    assert one.tolist() == two.tolist()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_the_control_s_products(engine: Engine) -> None:
    """⟨c,c⟩, ⟨c,d⟩, Σ|c| and max|c| in float64."""
    base, tuned = example(torch.bfloat16, "all")
    control = (base.float() + 0.5 * (tuned.float() - base.float())).bfloat16()
    found = np.zeros(len(BESIDE))

    engine.beside((words(base), words(tuned), words(control)), found)

    c, d = control.double() - base.double(), tuned.double() - base.double()
    expected = [float(value) for value in (c @ c, c @ d, c.abs().sum(), c.abs().max())]
    assert pytest.approx([*expected, 0.0], rel=LANES) == found.tolist()


def checkpoint(**tensors: Tensor) -> Checkpoint:
    return Checkpoint(MemoryStore({name.replace("__", "."): tensor for name, tensor in tensors.items()}))


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_or_too_large_to_square_spoils_nothing(dtype: torch.dtype, value: float) -> None:
    """One such value leaves every measure of the others as it was."""
    base, tuned = (side.reshape(200, 200) for side in example(dtype, "all"))
    tuned[3, 4] = value
    finite = torch.isfinite(tuned)

    row = al.diff(checkpoint(w=base), checkpoint(w=tuned), progress=False).frame.iloc[0]

    d = (tuned.double() - base.double())[finite]
    assert pytest.approx(float(d.norm()), rel=LANES) == row["frobenius"]
    assert int((~finite).sum()) == row["nonfinite"]
    assert int((d != 0).sum()) == row["changed"]


def test_equal_nan_is_no_change() -> None:
    """What is broken in the same way on both sides did not move."""
    base = torch.randn(30, 30)
    base[0, 0] = math.nan

    drift = al.diff(checkpoint(w=base), checkpoint(w=base.clone()), progress=False)

    assert 1 == drift.ledger.set_index("state").loc["identical", "sites"]
    assert 1 == drift.frame["nonfinite"].iloc[0]


@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (1, 70_001), (3, 65_537), (129, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [*WORDS, torch.float64, torch.float8_e4m3fn], ids=str)
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Odd lengths, vectors and wide dtypes have the norms of float64."""
    base, tuned = (torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))
    kin = torch.ones(2, 2)

    frame = al.diff(checkpoint(kin=kin, w=base), checkpoint(kin=kin, w=tuned), progress=False).frame

    row = frame[frame["parameter"] == "w"].iloc[0]
    assert pytest.approx(float((tuned.double() - base.double()).norm()), rel=LANES) == row["frobenius"]
    assert pytest.approx(float(base.double().norm()), rel=LANES) == row["base_norm"]


class Wide(nn.Module):
    """Enough parameters for many parts and blocks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide = nn.Linear(300, 301)
        self.half = nn.Linear(64, 70).bfloat16()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 1 << 12)


def agree(one: pd.DataFrame, two: pd.DataFrame) -> None:
    """Two engines, or two ways of cutting, count the same and sum the same up to float32 lanes."""
    for name in COUNTED:
        assert one[name].tolist() == two[name].tolist(), name
    for name in SUMMED:
        np.testing.assert_allclose(one[name], two[name], rtol=2 * LANES, err_msg=name)
    # cosine = (‖b‖² + ⟨b,d⟩) / ‖b‖‖t‖. Either term is off by LANES of its own size, which may be larger
    # than their sum, and the norms by LANES of the cosine: an absolute error, of about 1e-6 and no less.
    reach = (one["base_norm"] + one["frobenius"]) / one["tuned_norm"] + 1
    assert ((one["cosine"] - two["cosine"]).abs() <= 2 * LANES * reach).all()


def test_threads_change_nothing(small_parts: None) -> None:
    """Four threads give the bits of one."""
    base, tuned = Wide(0), Wide(1)
    before = torch.get_num_threads()
    one = al.diff(base, tuned, control=Wide(2), progress=False).frame
    torch.set_num_threads(4)
    try:
        four = al.diff(base, tuned, control=Wide(2), progress=False).frame
    finally:
        torch.set_num_threads(before)

    assert one.to_dict("list") == four.to_dict("list")


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts and blocks give the same counts, and the same norms up to the order of their sums."""
    base, tuned = Wide(0), Wide(1)
    whole = al.diff(base, tuned, progress=False).frame
    monkeypatch.setattr(parts, "PART", 1 << 12)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 10)

    cut = al.diff(base, tuned, progress=False).frame

    agree(whole, cut)


def test_without_a_compiler_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's engine gives the same counts, and the same norms up to the rounding of float32 lanes."""
    base, tuned = Wide(0), Wide(1)
    compiled = al.diff(base, tuned, progress=False).frame
    monkeypatch.setattr("affectlens.drift.diffing.engine", lambda: torch_engine)

    plain = al.diff(base, tuned, progress=False).frame

    agree(compiled, plain)


def test_no_folder_to_keep_compiled_code_in() -> None:
    """Where nothing can be written, the engine is compiled anew and works."""
    code = "from affectlens.drift import numba_engine; import numpy as np; s = np.zeros(8)\n"
    code += "numba_engine.measure((np.ones(4, np.uint32), np.zeros(4, np.uint32)), s); print(int(s[6]))"
    environment = {**os.environ, "NUMBA_CACHE_DIR": "/proc/none"}

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )

    assert "4" == run.stdout.strip()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="others convert float16 themselves")
def test_a_processor_that_cannot_convert_float16_uses_torch() -> None:
    """Compiled for the oldest x86-64 there is, a float16 pair is still compared; LLVM would abort."""
    code = "import torch, affectlens as al; from torch import nn\n"
    code += "one, two = (nn.Linear(9, 9).half() for _ in range(2))\n"
    code += "print(al.diff(one, two, progress=False).frame['changed'].sum() > 80)"
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )

    assert ("True", "") == (run.stdout.strip(), run.stderr)


def test_a_thread_s_error_ends_the_run() -> None:
    """The first error is raised, and no thread is left behind."""

    def broken(part: parts.Part) -> object:
        raise ValueError(part.strip.site.parameter)

    plan = list(parts.strips(_pairing(), None, detail=parts.Detail()))
    with pytest.raises(ValueError, match="w"):
        streaming.stream(plan, broken, tell=lambda _: None)  # type: ignore[arg-type]


def _pairing() -> object:
    from affectlens.checkpoints import pair

    return pair(checkpoint(w=torch.ones(3, 3)), checkpoint(w=torch.zeros(3, 3)))
