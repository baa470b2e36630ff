"""The door to nnsight: the same bits as by hooks, and a model that is left as it was."""

import contextlib
import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError, Remark
from affectlens.interventions import Knockout, Mean, Patch, Randomise, Resample, Scale, Shuffle, Steer
from affectlens.lens.hooks.places import place_of
from affectlens.sites import Point, Points
from tests.lens.families import BY_NAME, FEW, base, logits, tuned
from tests.lens.test_families import changed
from tests.lens.test_lens import same, snapshot
from tests.numbers import differ

NAMES = (*FEW, "qwen2_audio", "whisper")
EVERY = tuple(BY_NAME)
GENERATING = ("llama", "qwen2_moe", "qwen2_5_vl", "gemma3", "qwen2_audio", "qwen2_5_omni")
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
# What nnsight leaves in a module.
TRACES = ("forward", "__nnsight__")

Plan = Callable[[str, nn.Module], Sequence[Any]]


def _sites(model: nn.Module) -> al.Sites:
    found = al.Lens(model).sites.where(tower="language", param="weight")
    return al.Sites(site for site in found if site.layer is not None)


def _weights(model: nn.Module) -> al.Sites:
    return al.Sites(site for site in _sites(model) if site.role in ("gate_proj", "fc1", "v_proj", "o_proj"))


def _at(model: nn.Module, kind: str, span: Any = None) -> Points:
    """The first two places of a kind: stacked experts have none."""
    found: dict[Any, Point] = {}
    for site in _sites(model):
        point = Point(site, kind, span)
        with contextlib.suppress(LensError):
            found.setdefault(place_of(point, model=model, live=al.Lens(model).checkpoint), point)
    return Points(found.values())[:2]


def _vector(where: Points, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    everywhere = Points([Point(where[0].site, where[0].kind)])
    passed: Any = al.Lens(model).record(everywhere, batch)[everywhere[0]]
    return torch.linspace(-1, 1, passed.values.shape[-1])


def _steer(name: str, model: nn.Module) -> Sequence[Any]:
    where = _at(model, "residual", "last")
    return [Steer(where, vector=_vector(where, model, BY_NAME[name].batch()))]


def _recorded(model: nn.Module, where: Points, name: str, seed: int) -> Any:
    return al.Lens(model).record(where, BY_NAME[name].batch(seed))


def _of_medium(name: str, model: nn.Module) -> Sequence[Any]:
    media = BY_NAME[name].media
    return [Scale(_at(model, "output", media[0] if media else "prompt"), factor=1.5)]


def _knockout(name: str, model: nn.Module) -> Sequence[Any]:
    return [Knockout(_sites(model).where(role="o_proj", layer=0), source=0, target="last")]


PLANS: dict[str, Plan] = {
    "transplant": lambda n, m: [al.Transplant(_weights(m), donor=tuned(n))],
    "half": lambda n, m: [al.Transplant(_weights(m), donor=tuned(n), alpha=0.5)],
    "zero": lambda _, m: [al.Zero(_weights(m)[:1])],
    "scale": lambda _, m: [Scale(_weights(m), factor=1.25)],
    "randomise": lambda _, m: [Randomise(_weights(m), seed=3)],
    "shuffle": lambda n, m: [Shuffle(_weights(m), seed=3, donor=tuned(n))],
    "zero output": lambda _, m: [al.Zero(_at(m, "output"))],
    "zero input": lambda _, m: [al.Zero(_at(m, "input", "last"))],
    "scale pre-activation": lambda _, m: [Scale(_at(m, "pre_activation"), factor=0.5)],
    "scale gated": lambda _, m: [Scale(_at(m, "gated", (0, 2, -1)), factor=0.5)],
    "zero heads": lambda _, m: [al.Zero(_at(m, "heads", "text"))],
    "scale a medium": _of_medium,
    "steer residual": _steer,
    "mean": lambda n, m: [Mean(_at(m, "gated"), over=_recorded(m, _at(m, "gated"), n, 1))],
    "resample": lambda n, m: [Resample(_at(m, "output"), over=_recorded(m, _at(m, "output"), n, 1))],
    "patch": lambda n, m: [Patch(_at(m, "residual"), source=_recorded(m, _at(m, "residual"), n, 1))],
    "patch from another model": lambda n, m: [Patch(_at(m, "residual"), source=al.Lens(tuned(n)))],
    "knockout": _knockout,
    "several": lambda n, m: [
        al.Transplant(_weights(m), donor=tuned(n)),
        *_of_medium(n, m),
        *_steer(n, m),
        *_of_medium(n, m),
    ],
}
# The others are asked of one fused, one sparse, one seeing and hearing model, and one of two stacks.
EVERYWHERE = ("transplant", "zero heads", "scale a medium", "resample", "patch", "knockout", "several")
SOME = ("phi3", "qwen2_moe", "qwen2_5_omni", "t5_gated")
# What can't be asked of a model: its encoder's input has no text, or its attention has no such mask.
ABSENT = [("zero heads", "whisper"), ("zero heads", "t5_gated"), ("knockout", "whisper"),
          ("knockout", "t5_gated"), ("knockout", "gpt2")]  # fmt: skip
ALL = [
    (plan, name)
    for plan in PLANS
    for name in (EVERY if plan == "several" else NAMES if plan in EVERYWHERE else SOME)
    if (plan, name) not in ABSENT
]


def traced(model: nn.Module, batch: dict[str, Tensor], sight: Any) -> Tensor:
    """The logits of a trace."""
    with torch.inference_mode(), sight.trace(**batch, use_cache=False):
        found: Tensor = sight.output.logits.save()
    return found


def sighted(model: nn.Module, *interventions: Any) -> Any:
    """The door, whatever is said on opening it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)
        return al.Lens(model).nnsight(*interventions)


def left_in(model: nn.Module) -> list[str]:
    """What nnsight has left in which modules."""
    return [name for name, module in model.named_modules() for trace in TRACES if trace in module.__dict__]


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    return [
        tuple(len(one) for one in (module._forward_hooks, module._forward_pre_hooks))
        for module in model.modules()
    ]


# ---------------------------------------------------------------- the same plan, two ways


@pytest.mark.parametrize(("plan", "name"), ALL)
def test_nnsight_gives_the_bits_that_hooks_give(plan: str, name: str) -> None:
    """Each intervention, on text, pictures, films and sound, in one stack and in two."""
    model, batch = base(name), BY_NAME[name].batch()
    before = snapshot(model)
    interventions = PLANS[plan](name, model)
    expected = changed(model, batch, *interventions)

    actual = traced(model, batch, sighted(model, *interventions))

    assert torch.equal(expected, actual)
    assert differ(logits(model, batch), actual)
    assert [] == left_in(model)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("plan", ["transplant", "scale a medium", "several", "patch from another model"])
@pytest.mark.parametrize("name", GENERATING)
def test_tokens_are_generated_as_by_hooks(name: str, plan: str) -> None:
    """Step by step with a cache; traced or called."""
    model, batch = base(name), BY_NAME[name].batch()
    interventions = PLANS[plan](name, model)
    if plan == "patch from another model" and {"image", "video"} & set(BY_NAME[name].media):
        # `generate` has pictures encoded by this model, so the other can't see them: both say so.
        with pytest.raises(LensError, match="has already encoded"), al.Lens(model).intervene(*interventions):
            model.generate(**batch, **SETTINGS)
        with pytest.raises(Exception, match="has already encoded"):
            sighted(model, *interventions).generate(**batch, **SETTINGS)
        return
    with al.Lens(model).intervene(*interventions):
        expected = model.generate(**batch, **SETTINGS)

    sight = sighted(model, *interventions)
    with sight.generate(**batch, **SETTINGS) as tracer:
        actual = tracer.result.save()

    assert torch.equal(expected, actual)
    assert torch.equal(expected, sight.generate(**batch, **SETTINGS))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapted_model_is_seen_as_by_hooks() -> None:
    """PEFT calls the model that it wraps by its `forward`, and nnsight stands there."""
    family = BY_NAME["llava"]
    settings = peft.LoraConfig(target_modules=r".*language_model.*gate_proj", r=2, init_lora_weights=False)
    model, batch = peft.get_peft_model(family.build(), settings).eval(), family.batch()
    plan = [Scale(_at(model, "pre_activation", "image"), factor=0.5)]
    with al.Lens(model).intervene(*plan):
        expected = model.generate(**batch, **SETTINGS)

    sight = sighted(model, *plan)

    assert torch.equal(changed(model, batch, *plan), traced(model, batch, sight))
    assert torch.equal(expected, sight.generate(**batch, **SETTINGS))


def test_what_is_recorded_around_a_trace_is_what_passed() -> None:
    """Where a recording by the lens and an edit of nnsight meet, the edit comes first, as in a block."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    where, lens = _at(model, "residual"), al.Lens(model)
    with lens.intervene(Scale(where, factor=2.0)), lens.record(where) as expected:
        logits(model, batch)
    with lens.record(where) as actual:
        traced(model, batch, lens.nnsight(Scale(where, factor=2.0)))

    for point in where:
        assert torch.equal(expected[point].values, actual[point].values)  # type: ignore[union-attr]


def test_each_step_of_generation_is_changed() -> None:
    """A point at what is generated is reached at every step but the first, as by hooks."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    where = _at(model, "residual", "generated")
    plan = [Steer(where, vector=10 * _vector(where, model, batch))]
    with al.Lens(model).intervene(*plan):
        expected = model.generate(**batch, **SETTINGS)

    actual = sighted(model, *plan).generate(**batch, **SETTINGS)

    assert torch.equal(expected, actual)
    assert differ(model.generate(**batch, **SETTINGS), actual)


def test_a_trace_can_be_repeated() -> None:
    """Nothing adds up from one run to the next, nor from one kind of run to another."""
    model, batch = base("qwen2_5_vl"), BY_NAME["qwen2_5_vl"].batch()
    sight = sighted(model, *PLANS["several"]("qwen2_5_vl", model))
    first = traced(model, batch, sight)
    sight.generate(**batch, **SETTINGS)

    with torch.inference_mode():
        untraced = sight.trace(**batch, use_cache=False, trace=False).logits

    assert torch.equal(first, traced(model, batch, sight))
    assert torch.equal(first, untraced)


def test_gradients_pass_what_nnsight_rewrites() -> None:
    """A scaled output has its gradient scaled, also where nnsight reads it."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    where = _at(model, "residual")[:1]

    def gradient(sight: Any) -> Any:
        with sight.trace(**batch):
            embedded = sight.model.embed_tokens.output
            loss = sight.model.layers[0].output.sum()
            with loss.backward():
                found = embedded.grad.save()
        return found

    once, thrice = gradient(sighted(model)), gradient(sighted(model, Scale(where, factor=3.0)))

    assert torch.allclose(3 * once, thrice, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what nnsight sees


def test_the_module_is_the_lenss_own() -> None:
    """No copy is made, and without interventions nothing is changed."""
    model, batch = base("llava"), BY_NAME["llava"].batch()
    sight = sighted(model)

    assert sight._module is model
    assert torch.equal(logits(model, batch), traced(model, batch, sight))


def test_a_block_reads_what_was_changed() -> None:
    """The user's own code comes after our edits, and its own writing after that."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    sight = sighted(model, al.Zero(_at(model, "residual")[:1]))
    with torch.inference_mode(), sight.trace(**batch):
        read = sight.model.layers[0].output.save()
        sight.model.layers[1].output = torch.zeros_like(read)
        out = sight.output.logits.save()

    assert not read.any()
    assert torch.equal(out, changed(model, batch, al.Zero(_at(model, "residual"))))


def test_operations_within_a_module_are_seen() -> None:
    """`.source` works beside our edits: it shows the activation function of changed pre-activations."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    sight = sighted(model, al.Zero(_at(model, "pre_activation")[:1]))
    with torch.inference_mode(), sight.trace(**batch):
        gate = sight.model.layers[0].mlp.source.self_act_fn_0.output.save()

    assert not gate.any()


def test_a_block_around_a_trace_holds_in_it() -> None:
    """It is the same module, so weights that a lens has changed are those that nnsight runs."""
    model, batch = base("llava"), BY_NAME["llava"].batch()
    plan = PLANS["transplant"]("llava", model)
    sight = sighted(model)
    with al.Lens(model).intervene(*plan):
        actual = traced(model, batch, sight)

    assert torch.equal(changed(model, batch, *plan), actual)


def test_one_invoke_a_trace() -> None:
    """nnsight itself refuses to put two inputs with media into one batch."""
    model, batch = base("llava"), BY_NAME["llava"].batch()
    sight = sighted(model)

    def two() -> None:
        with sight.trace() as tracer:
            with tracer.invoke(**batch):
                sight.output.logits.save()
            with tracer.invoke(**batch):
                sight.output.logits.save()

    with pytest.raises(NotImplementedError, match="batching multiple invokes"):
        two()
    assert torch.equal(logits(model, batch), traced(model, batch, sight))


# ---------------------------------------------------------------- what is said


def test_a_point_that_nothing_passed_is_told() -> None:
    """A film's positions in a run without a film, as by hooks; but not of a run that was broken off."""
    family = BY_NAME["qwen2_5_vl"]
    model, batch = base(family.name), {**BY_NAME["llama"].batch()}
    sight = sighted(model, Scale(_at(model, "output", "video"), factor=2.0))

    with pytest.warns(Remark, match="matched no position in 1 forward passes"):
        traced(model, batch, sight)
    with sight.trace(**batch) as tracer:
        sight.model.language_model.layers[0].output.save()
        tracer.stop()


def test_zeroed_gates_are_told_when_the_door_is_opened() -> None:
    """That a zeroed gate is a deleted MLP is said once, not at each run."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    with pytest.warns(Remark, match="deletes the MLP"):
        sight = al.Lens(model).nnsight(al.Zero(_sites(model).where(role="gate_proj")))

    traced(model, batch, sight)


def test_a_compiled_model_is_refused() -> None:
    """A compiled graph would pass nnsight by; nothing of it is touched."""
    model = BY_NAME["llama"].build()
    model.model.layers[0]._compiled_call_impl = model.forward  # what `.compile()` sets

    with pytest.raises(LensError, match="is compiled"):
        al.Lens(model).nnsight()
    assert [] == left_in(model)


def test_what_cannot_be_changed_is_refused_when_the_door_is_opened() -> None:
    """Not at the first run; and the model is as it was."""
    model = base("llama")
    before = snapshot(model)
    plan = PLANS["transplant"]("llama", model)

    with pytest.raises(LensError, match="shape"):
        al.Lens(model).nnsight(*plan, al.Transplant(_weights(model), donor=base("qwen2_5_vl")))
    assert [] == left_in(model)
    assert same(before, snapshot(model))


# ---------------------------------------------------------------- what is left


def _raising(error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("plan", ["transplant", "several"])
def test_a_run_that_fails_leaves_nothing(plan: str, error: type[BaseException]) -> None:
    """In the model, in the user's block, at its start and while it waits for what has passed."""
    name = "qwen2_5_vl"
    model, batch = base(name), BY_NAME[name].batch()
    logits(model, batch)  # transformers leaves hooks of its own at the first run
    before, hooked = snapshot(model), hooks(model)
    sight = sighted(model, *PLANS[plan](name, model))
    layers = sight.model.language_model.layers

    def within() -> None:
        handle = model.model.language_model.layers[1].register_forward_hook(_raising(error))
        try:
            traced(model, batch, sight)
        finally:
            handle.remove()

    def block() -> None:
        with sight.trace(**batch):
            layers[0].output.save()
            raise error

    def start() -> None:
        with sight.trace(**batch):
            raise error

    def backwards() -> None:
        with sight.trace(**batch):
            layers[1].output.save()
            layers[0].output.save()

    for failing in (within, block, start):
        with pytest.raises(error):
            failing()
        assert same(before, snapshot(model))
        assert hooked == hooks(model)
    with pytest.raises(Exception, match="already ran past it"):
        backwards()
    assert same(before, snapshot(model))
    assert torch.equal(changed(model, batch, *PLANS[plan](name, model)), traced(model, batch, sight))


def test_a_forgotten_wrapper_leaves_at_once() -> None:
    """Without waiting for Python to look for circles; many in a row leave nothing either."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    plan = PLANS["several"]("llama", model)
    gc.disable()
    try:
        traced(model, batch, sighted(model, *plan))
        assert [] == left_in(model)
    finally:
        gc.enable()
    circles = []
    for _ in range(30):
        circle: list[Any] = [sighted(model, *plan)]
        circle.append(circle)
        circles.append(circle)
        del circle
        circles.clear()
    gc.collect()
    assert [] == left_in(model)


def test_the_last_wrapper_takes_nnsight_out() -> None:
    """Of two around one model, and of a user's own, none takes away what another needs."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    first, second = sighted(model), sighted(model, *PLANS["transplant"]("llama", model))
    with first:
        pass

    assert torch.equal(
        changed(model, batch, *PLANS["transplant"]("llama", model)), traced(model, batch, second)
    )
    with second:
        assert [] != left_in(model)
    assert [] == left_in(model)


def test_a_users_own_wrapper_is_left() -> None:
    """A `NNsight` that was there before works on."""
    from nnsight import NNsight

    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    own = NNsight(model)
    with sighted(model):
        pass

    assert torch.equal(logits(model, batch), traced(model, batch, own))


def test_a_wrapper_that_fails_leaves_nothing() -> None:
    """A module of a name that nnsight needs is warned of; as an error that ends the wrapping half done."""
    model = BY_NAME["llama"].build()
    model.model.layers[1].output = nn.Linear(2, 2)

    with pytest.raises(UserWarning, match="already serves"):
        al.Lens(model).nnsight()
    assert [] == left_in(model)


def test_a_forward_of_ones_own_comes_back() -> None:
    """Where a module had a `forward` of its own, it has that very one again."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    mlp = model.model.layers[0].mlp
    mlp.forward = own = lambda x: 2 * x
    expected = logits(model, batch)
    with sighted(model) as sight:
        assert torch.equal(expected, traced(model, batch, sight))

    assert own is mlp.__dict__["forward"]
    assert ["model.layers.0.mlp"] == left_in(model)


SEEN = "'nnsight' in sys.modules, hasattr(object(), 'save'), torch.Tensor.backward is backward"
# In a process of its own: what checks shapes in the tests wraps functions, and an interrupt may fall there.
PROGRAM = f"""
import contextlib, gc, random, signal, sys, time
import torch

backward = torch.Tensor.backward
import affectlens as al, affectlens.lens.doors.nnsight_door, affectlens.lens.lens
print({SEEN})
al.Lens(torch.nn.Linear(2, 2)).nnsight()
print({SEEN})

from tests.lens.doors import test_nnsight as tests

model, batch = tests.base("llama"), tests.BY_NAME["llama"].batch()
sight = tests.sighted(model, *tests.PLANS["several"]("llama", model))
expected = tests.traced(model, batch, sight)
before, hooked = tests.snapshot(model), tests.hooks(model)
began = time.perf_counter()
tests.traced(model, batch, sight)
lasts = time.perf_counter() - began
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
drawn, broken, left = random.Random(0), 0, 0
gc.disable()  # Python drops an interrupt that falls into a finalizer
for _ in range(60):
    whole = False
    # nnsight raises TypeError of its own where an interrupt falls on code that has no line.
    with contextlib.suppress(KeyboardInterrupt, TypeError):
        signal.setitimer(signal.ITIMER_REAL, drawn.uniform(1e-5, lasts))
        tests.traced(model, batch, sight)
        whole = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    broken += not whole
    left += not tests.same(before, tests.snapshot(model)) or hooked != tests.hooks(model)
    left += signal.getsignal(signal.SIGINT) is not signal.default_int_handler
print(broken > 10, left, torch.equal(expected, tests.traced(model, batch, sight)))
"""


@pytest.fixture(scope="module")
def apart() -> list[str]:
    """What a process of its own found."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    return run.stdout.splitlines()


def test_python_is_changed_when_the_door_is_opened_and_not_before(apart: list[str]) -> None:
    """As the docstring says: `object` has `save`, and `Tensor.backward` is another function."""
    assert ["False False True", "True True False"] == apart[:2]


def test_ctrl_c_leaves_nothing(apart: list[str]) -> None:
    """At sixty moments of a run, in nnsight's own code too: bits, hooks and the handler are as before."""
    assert "True 0 True" == apart[2]
