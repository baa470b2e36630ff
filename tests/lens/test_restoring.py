"""After any error in an intervention, every bit, hook, flag and random state is as before."""

import _thread
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.lens.restoring import Swaps
from tests.lens.test_lens import same, snapshot
from tests.small_models import nudge, tiny

FAMILIES = ("llama", "qwen2", "gemma2", "llava", "qwen2_5_vl", "gemma3")  # gemma's embeddings are tied
ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError, SystemExit, StopIteration)
PLACES = ("forward", "generate", "donor", "nested", "between")


def state(model: nn.Module) -> list[object]:
    """Return all state but tensors: flags, modes, hooks, ties, and every random generator."""
    parts = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [
        {name: (p.requires_grad, id(p), p.grad) for name, p in parameters.items()},
        {name: (m.training, sorted(vars(m)), id(vars(m).get("forward"))) for name, m in parts.items()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in parts.items()},
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
        torch.is_grad_enabled(),
        signal.getsignal(signal.SIGINT),
    ]


class Breaking:
    """An intervention that raises while it makes its edits."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def edits(self, live: al.Checkpoint) -> Any:
        raise self.error("in the donor")


@contextmanager
def broken(model: nn.Module, error: type[BaseException]) -> Iterator[None]:
    """Make the last layer of a model raise within the block."""

    def hook(*_: object) -> None:
        raise error("in the forward pass")

    handle = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run(model: nn.Module, place: str) -> None:
    ids = torch.arange(1, 9).reshape(1, -1)
    if place == "generate":
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    else:
        model(input_ids=ids)


def break_off(lens: al.Lens, donor: nn.Module, error: type[BaseException], *, place: str) -> None:
    before = snapshot(lens.model)
    gates = al.Zero(lens.sites.where(tower="language", role="gate_proj"))
    with lens.intervene(al.Transplant(lens.sites, donor=donor, alpha=0.5), gates), ExitStack() as stack:
        assert not same(before, snapshot(lens.model))
        if place == "nested":
            stack.enter_context(lens.intervene(al.Transplant(lens.sites, donor=donor), gates))
        if place == "donor":
            stack.enter_context(lens.intervene(gates, Breaking(error)))
        if place == "between":
            raise error
        stack.enter_context(broken(lens.model, error))
        run(lens.model, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", ERRORS)
def test_nothing_is_left_of_a_broken_intervention(
    error: type[BaseException], place: str, family: str, dtype: torch.dtype
) -> None:
    """300 injected errors leave nothing behind: 5 errors, 5 places, 6 families, 2 dtypes."""
    model, donor = tiny(family).to(dtype), nudge(tiny(family), "").to(dtype)
    next(iter(model.parameters())).requires_grad = False
    lens = al.Lens(model)
    before, about = snapshot(model), state(model)
    with pytest.raises(error):
        break_off(lens, donor, error, place=place)

    assert same(before, snapshot(model))
    assert about == state(model)


# In a separate process: here the shape checks wrap functions, and an interrupt may fall into a wrapper.
MOMENTS = """
import gc, signal, time
import numpy as np, torch
import affectlens as al
from tests.small_models import nudge, tiny
from tests.lens.test_lens import same, snapshot

signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
model, donor = tiny("gemma2"), nudge(tiny("gemma2"), "")
lens, ids = al.Lens(model), torch.arange(1, 5).reshape(1, -1)
gc.collect()
gc.disable()  # Python drops an interrupt that falls into a finalizer
before, change, places = snapshot(model), al.Transplant(lens.sites, donor=donor), []
took = []
for _ in range(20):  # how long a block takes on this machine, so that all of it is hit
    start = time.perf_counter()
    with lens.intervene(change), lens.intervene(al.Zero(lens.sites)):
        model(input_ids=ids)
    took.append(time.perf_counter() - start)
long = sorted(took)[10]
for delay in np.random.default_rng(0).uniform(1e-6, 1.2 * long, 1000):
    place = "entering"
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        with lens.intervene(change), lens.intervene(al.Zero(lens.sites)):
            place = "inside"
            if delay > 0.0012:
                model(input_ids=ids)
            place = "leaving"
        place = "after"
        time.sleep(0.1)
    except KeyboardInterrupt:
        places.append(place)
    assert same(before, snapshot(model)), (place, delay)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(len(places), *(places.count(place) for place in ("entering", "inside", "leaving", "after")))
"""


def test_an_interrupt_at_any_moment_leaves_every_bit(
    record_property: Callable[[str, object], None],
) -> None:
    """A thousand real interrupts while entering, running and leaving: each time all is as before."""
    run = subprocess.run([sys.executable, "-c", MOMENTS], capture_output=True, text=True, check=False)
    total, *places = map(int, run.stdout.split() or [0])

    assert (0, "") == (run.returncode, run.stderr)
    assert 1000 == total
    assert min(places) > 0
    where = ("entering", "inside", "leaving", "after")
    told = ", ".join(f"{count} {place}" for count, place in zip(places, where, strict=True))
    record_property("interrupts at an intervention, all undone to the bit", f"{total} ({told})")


@pytest.mark.parametrize("handled", [True, False])
def test_an_interrupt_while_undoing_waits_until_all_is_undone(handled: bool) -> None:
    """With Python's handler Ctrl-C waits until all is undone; with the user's, undoing is tried again."""

    class Owner:
        value = 0

        def __setattr__(self, name: str, value: int) -> None:
            if value < 10 and not hits:
                hits.append(value)
                signal.raise_signal(signal.SIGINT)
            super().__setattr__(name, value)

    def raising(*_: object) -> None:
        raise KeyboardInterrupt

    hits: list[int] = []
    owners = [Owner() for _ in range(3)]
    swaps = Swaps()
    known = signal.signal(signal.SIGINT, signal.default_int_handler if handled else raising)
    try:
        for owner in owners:
            swaps.swap(owner, "value", value=10)
        with pytest.raises(KeyboardInterrupt):
            swaps.undo()
    finally:
        signal.signal(signal.SIGINT, known)

    assert [0, 0, 0] == [owner.value for owner in owners]
    assert 1 == len(hits)


def test_a_handler_of_the_users_is_left_alone() -> None:
    """A handler of the user stays in place, and a block in another thread changes no handler."""
    heard: list[int] = []
    lens = al.Lens(tiny("llama"))
    known = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with lens.intervene(al.Zero(lens.sites)):
            _thread.interrupt_main()
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, known)
    thread = threading.Thread(target=_entered, args=(lens,))
    thread.start()
    thread.join()

    assert [signal.SIGINT] == heard
    assert known is signal.getsignal(signal.SIGINT)


def _entered(lens: al.Lens) -> None:
    with lens.intervene(al.Zero(lens.sites)):
        pass


def test_what_can_not_be_set_back_does_not_keep_the_rest() -> None:
    """An owner that can't be restored raises its error; all others are restored."""

    class Stubborn:
        value = 0

        def __setattr__(self, name: str, value: int) -> None:
            if value == 0:
                raise ValueError("no")
            super().__setattr__(name, value)

    class Plain:
        value = 0

    owners: list[Any] = [Plain(), Stubborn(), Plain()]
    swaps = Swaps()
    for owner in owners:
        swaps.swap(owner, "value", value=1)
    with pytest.raises(ValueError, match="no"):
        swaps.undo()

    assert [0, 1, 0] == [owner.value for owner in owners]


def test_an_interrupt_that_waited_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while weights are swapped in ends the block before its first line, with all undone."""
    model = tiny("llama")
    lens, before = al.Lens(model), snapshot(model)
    swap: Callable[..., None] = Swaps.swap
    monkeypatch.setattr(Swaps, "swap", lambda *a, **k: (swap(*a, **k), signal.raise_signal(signal.SIGINT)))
    reached = False
    with pytest.raises(KeyboardInterrupt), lens.intervene(al.Zero(lens.sites)):
        reached = True

    assert not reached
    assert same(before, snapshot(model))
