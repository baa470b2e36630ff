"""After any error in a block of hooks or swaps, every bit, hook, flag and random state is as before."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import LensError, Remark
from affectlens.sites import Point, Points
from tests.lens.families import BY_NAME, Batch, base, logits, tuned, typed
from tests.lens.test_lens import same, snapshot
from tests.lens.test_restoring import state
from tests.numbers import differ

FAMILIES = ("llama", "gpt2", "qwen2_moe", "qwen2_5_vl", "gemma3", "qwen2_5_omni")
ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError, SystemExit, StopIteration)
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}


def hooks(model: nn.Module) -> list[object]:
    """List every hook of every module, in order, with its kind."""
    names = [name for name in vars(nn.Module()) if "hooks" in name]
    return [
        (name, kind, [(number, id(one)) for number, one in getattr(module, kind).items()])
        for name, module in model.named_modules()
        for kind in names
    ]


class Breaking:
    """A rewrite that raises in the pass with this number, and changes the activations before it."""

    def __init__(self, point: Point, error: type[BaseException], *, number: int = 0) -> None:
        self.point, self.error, self.number, self.passes = point, error, number, 0

    def rewrites(self, lens: al.Lens) -> Mapping[Point, Callable[..., torch.Tensor]]:
        return {self.point: self._broken}

    def _broken(self, values: torch.Tensor, moment: object) -> torch.Tensor:
        self.passes += 1
        if self.passes > self.number:
            raise self.error("in a rewrite")
        return values + 1


class Unready:
    """An intervention that raises while it makes its rewrites."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def rewrites(self, lens: al.Lens) -> Mapping[Point, object]:
        raise self.error("before it is entered")


@contextmanager
def broken(model: nn.Module, error: type[BaseException]) -> Iterator[None]:
    """Make the model's last norm raise within the block."""

    def hook(*_: object) -> None:
        raise error("in the forward pass")

    last = [m for m in model.modules() if "Norm" in type(m).__name__][-1]
    handle = last.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def interventions(name: str, lens: al.Lens, kind: str) -> tuple[object, ...]:
    """Make interventions of a kind, alone or with others."""
    sites = lens.sites.where(tower="language", role="o_proj", param="weight")
    points, donor = sites.at("heads"), tuned(name)
    weights = al.Transplant(lens.sites, donor=donor, alpha=0.5)
    if kind in ("steer", "mean", "resample", "patch"):
        recorded = lens.record(points, BY_NAME[name].batch())
    if kind == "zero":
        return (al.Zero(points),)
    if kind == "scale":
        # Of one head: Gemma's norm behind o_proj takes a common factor out again, up to rounding.
        head = Points(Point(site.at(head=0), "heads") for site in sites)
        return al.Scale(sites, factor=2.0), al.Scale(head, factor=0.1)
    if kind == "steer":
        return weights, al.Steer(points, vector=recorded[points[0]].mean.float())
    if kind == "mean":
        return (al.Mean(points, over=recorded),)
    if kind == "resample":
        return al.Resample(points, over=recorded), al.Shuffle(sites, seed=1)
    if kind == "patch":
        return al.Patch(points, source=recorded), weights
    if kind == "beside":
        return al.Patch(points, source=al.Lens(donor)), al.Randomise(sites, donor=donor, seed=2)
    return al.Knockout(sites, source="prompt", target="last"), weights


KINDS = ("zero", "scale", "steer", "mean", "resample", "patch", "beside", "knockout")
PLACES = ("forward", "rewrite", "generate", "step", "between", "nested", "entering", "recording")


def run(model: nn.Module, batch: Batch, *, generate: bool = False) -> None:
    if generate:
        model.generate(**batch, **SETTINGS)  # type: ignore[operator]
    else:
        logits(model, batch)


def break_off(
    lens: al.Lens, batch: Batch, changes: tuple[Any, ...], error: type[BaseException], *, place: str
) -> None:
    """Enter a block, and raise an error at a place in it."""
    point = Point(lens.sites.where(tower="language", role="o_proj", param="weight")[-1], "output")
    breaking = Breaking(point, error, number=2 if place == "step" else 0)
    with lens.intervene(*changes, *((breaking,) if place in ("rewrite", "step") else ())):
        if place == "between":
            run(lens.model, batch)
            raise error
        if place == "nested":
            with lens.intervene(al.Zero(lens.sites.where(role="norm"))), lens.intervene(*changes, breaking):
                run(lens.model, batch)
        if place == "entering":
            with lens.intervene(al.Scale(point, factor=3.0), al.Zero(lens.sites), Unready(error)):
                pytest.fail("the block was entered")
        if place == "recording":
            with lens.record(Points([point])), broken(lens.model, error):
                run(lens.model, batch)
        with broken(lens.model, error) if place in ("forward", "generate") else nullcontext():
            run(lens.model, batch, generate=place in ("generate", "step"))


@pytest.mark.parametrize(("kind", "place"), list(product(KINDS, PLACES)))
def test_nothing_is_left_of_a_broken_block(kind: str, place: str) -> None:
    """254 injected errors leave nothing behind: 8 kinds of change, 8 places, 6 families, 5 errors in turn."""
    speaking = kind == "beside" and place in (
        "generate",
        "step",
    )  # in `generate` only this model sees the pictures
    turn = KINDS.index(kind) + PLACES.index(place)
    turned = [FAMILIES[(turn + number) % len(FAMILIES)] for number in range(4)]
    for count, name in enumerate(FAMILIES[:3] if speaking else turned):
        error = ERRORS[(count + turn) % len(ERRORS)]
        model, batch = base(name), BY_NAME[name].batch()
        lens = al.Lens(model)
        changes = interventions(name, lens, kind)
        users: list[object] = []
        handle = next(model.children()).register_forward_hook(lambda *_, users=users: users.append(1))
        try:
            before, about, hooked, expected = (
                snapshot(model),
                state(model),
                hooks(model),
                logits(model, batch),
            )
            with pytest.raises(error) as raised:
                break_off(lens, batch, changes, error, place=place)

            assert "Error" not in str(raised.value)
            assert same(before, snapshot(model))
            assert hooked == hooks(model)
            assert about == state(model)
            assert torch.equal(expected, logits(model, batch))
        finally:
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_left_of_a_block_that_ends(kind: str, dtype: torch.dtype) -> None:
    """A block that ends normally leaves nothing behind, in any dtype; the donor is unchanged too."""
    for name in FAMILIES if dtype == torch.float32 else FAMILIES[::2]:
        model, batch = base(name, dtype), typed(BY_NAME[name].batch(), dtype)
        lens = al.Lens(model)
        changes = interventions(name, lens, kind)
        before, hooked, donor = snapshot(model), hooks(model), snapshot(tuned(name))
        expected, about = logits(model, batch), state(model)
        for _ in range(2):
            with lens.intervene(*changes):
                assert differ(expected, logits(model, batch))
                if kind != "patch" and kind != "beside":  # the recording has fewer steps than generation
                    run(model, batch, generate=True)
        assert same(before, snapshot(model))
        assert same(donor, snapshot(tuned(name)))
        assert hooked == hooks(model)
        assert about == state(model)
        assert torch.equal(expected, logits(model, batch))


# In a separate process: here the shape checks wrap functions, and an interrupt may fall into a wrapper.
MOMENTS = """
import gc, signal, time
import numpy as np, torch
import affectlens as al
from tests.lens.families import BY_NAME, base, logits, tuned
from tests.lens.hooks.test_hook_restoring import hooks
from tests.lens.test_lens import same, snapshot

signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
model, donor, batch = base("llama"), tuned("llama"), BY_NAME["llama"].batch()
lens = al.Lens(model)
sites = lens.sites.where(role="o_proj")
points, width = sites.at("heads"), 64
recorded = lens.record(points, batch)
changes = (al.Transplant(sites, donor=donor), al.Patch(points, source=recorded), al.Zero(sites.at("output")),
           al.Knockout(sites, source=0, target="last"))
before, hooked, expected = snapshot(model), hooks(model), logits(model, batch)
gc.collect()
gc.disable()  # Python drops an interrupt that falls into a finalizer
places, took = [], []
for _ in range(20):  # how long a block takes on this machine, so that all of it is hit
    start = time.perf_counter()
    with lens.intervene(*changes), lens.record(points):
        logits(model, batch)
    took.append(time.perf_counter() - start)
for delay in np.random.default_rng(0).uniform(1e-6, 1.2 * sorted(took)[10], 200):
    place = "entering"
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        with lens.intervene(*changes), lens.record(points):
            place = "inside"
            logits(model, batch)
            place = "leaving"
        place = "after"
        time.sleep(1)
    except KeyboardInterrupt:
        places.append(place)
    assert same(before, snapshot(model)), (place, delay)
    assert hooked == hooks(model), (place, delay)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert torch.equal(expected, logits(model, batch))
print(len(places), *(places.count(place) for place in ("entering", "inside", "leaving", "after")))
"""


def test_an_interrupt_at_any_moment_leaves_no_hook() -> None:
    """200 real interrupts while hooks are installed, called and removed: each time all is as before."""
    run = subprocess.run([sys.executable, "-c", MOMENTS], capture_output=True, text=True, check=False)
    total, *places = map(int, run.stdout.split() or [0])

    assert (0, "") == (run.returncode, run.stderr)
    assert 200 == total
    assert places[0] > 0
    assert places[1] > 0


@pytest.mark.filterwarnings("error::affectlens.errors.Remark")
def test_a_remark_made_an_error_leaves_nothing_behind() -> None:
    """A remark raised as an error, on entering or leaving a block, restores everything."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens, before, hooked = al.Lens(model), snapshot(model), hooks(model)
    gates = lens.sites.where(role="gate_proj")
    with pytest.raises(Remark), lens.intervene(al.Scale(gates.at("output"), factor=2.0), al.Zero(gates)):
        pytest.fail("the block was entered")
    assert same(before, snapshot(model))
    assert hooked == hooks(model)

    with pytest.raises(Remark), lens.intervene(al.Zero(gates.at("gated", span="generated"))):
        logits(model, batch)
    assert same(before, snapshot(model))
    assert hooked == hooks(model)


def test_hooks_of_the_users_stay_in_their_order() -> None:
    """Hooks of the user stay in order, also those that the user adds or removes inside a block."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    mlp, heard = model.model.layers[0].mlp.down_proj, []  # type: ignore[index, union-attr]
    first = mlp.register_forward_hook(lambda *_: heard.append("first"))
    with lens.intervene(al.Zero(lens.sites.where(role="down_proj").at("output"))):
        first.remove()
        mlp.register_forward_hook(lambda *_: heard.append("second"))
        logits(model, batch)
    logits(model, batch)

    assert ["second", "second"] == heard
    assert 1 == len(mlp._forward_hooks)


def test_blocks_left_in_another_order_leave_nothing() -> None:
    """Two blocks that overlap instead of nesting leave nothing behind once both are left."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    before, hooked, expected = snapshot(model), hooks(model), logits(model, batch)
    points = lens.sites.where(role="down_proj").at("output")
    one, other = lens.intervene(al.Scale(points, factor=2.0)), lens.intervene(al.Scale(points, factor=3.0))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)

    assert hooked == hooks(model)
    assert same(before, snapshot(model))
    assert torch.equal(expected, logits(model, batch))


def test_hundreds_of_blocks_leave_nothing() -> None:
    """300 blocks leave no hook behind and no change of a random generator."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    points = lens.sites.where(role="down_proj").at("gated")
    before, hooked, about = snapshot(model), hooks(model), state(model)
    for number in range(300):
        with suppress(LensError), lens.intervene(al.Scale(points, factor=0.5)):
            if number % 100 == 0:
                logits(model, batch)
            if number % 3 == 0:
                raise LensError("broken off")
    assert same(before, snapshot(model))
    assert hooked == hooks(model)
    assert about == state(model)
