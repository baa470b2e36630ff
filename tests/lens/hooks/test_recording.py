"""Recordings are right: values against raw hooks, moments against values, gradients against steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import LensError, NoSuchSite
from affectlens.lens import Activations, Statistics
from tests.lens.families import BY_NAME, base
from tests.numbers import differ

FAMILIES = ("llama", "phi3", "llava", "qwen2_5_vl", "gemma3", "qwen2_audio", "t5_gated")


@contextmanager
def hooked(module: nn.Module, *, before: bool) -> Iterator[list[torch.Tensor]]:
    """Collect a module's input or output with a plain hook of torch."""
    seen: list[torch.Tensor] = []
    if before:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    else:
        handle = module.register_forward_hook(lambda _, __, out: seen.append(first(out).clone()))
    try:
        yield seen
    finally:
        handle.remove()


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def language(lens: al.Lens, role: str) -> al.Sites:
    sites = lens.sites.where(tower="language", role=role, param="weight")
    return al.Sites(site for site in sites if site.stack != "encoder")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("role", "kind", "of", "before"),
    [("down_proj", "gated", "", True), ("o_proj", "heads", "", True), ("down_proj", "output", "", False)],
)
def test_values_are_what_a_raw_hook_sees(name: str, role: str, kind: str, of: str, before: bool) -> None:
    """A recording has the bits that a plain hook of torch sees."""
    lens, batch = al.Lens(base(name)), BY_NAME[name].batch()
    site = lens.sites.where(tower="language", role=role, param="weight")[-1]
    with hooked(lens.module(site), before=before) as seen:
        recording = lens.record(al.Sites([site]).at(kind), batch)

    assert torch.equal(seen[0], recording[recording.points[0]].values)


def test_a_slice_of_a_fused_matrix_is_recorded_alone() -> None:
    """In Phi-3, gate is the first half of the fused matrix's output, and up the second."""
    lens, batch = al.Lens(base("phi3")), BY_NAME["phi3"].batch()
    gate, up = language(lens, "gate_proj"), language(lens, "up_proj")
    with hooked(lens.module(gate[0]), before=False) as seen:
        found = lens.record(gate[:1].at("pre_activation") | up[:1].at("output"), batch)
    halves = seen[0].chunk(2, dim=-1)

    assert all(torch.equal(half, found[point].values) for half, point in zip(halves, found, strict=True))


def test_heads_and_neurons_are_their_features() -> None:
    """The activations of heads and neurons are slices of the whole."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    o, gate = language(lens, "o_proj")[0], language(lens, "gate_proj")[0]
    units = lens.checkpoint.units(o)
    assert units is not None
    whole = lens.record(al.Sites([o]).at("heads"), batch)
    heads = al.Sites(o.at(head=number) for number in range(units.count))
    parts = lens.record(heads.at("heads"), batch)
    gated = lens.record(al.Sites([gate]).at("gated") | al.Sites([gate.at(neuron=3)]).at("gated"), batch)

    assert torch.equal(whole[whole.points[0]].values, torch.cat([parts[point].values for point in parts], -1))
    assert torch.equal(gated[gated.points[0]].values[..., 3:4], gated[gated.points[1]].values)


@pytest.mark.parametrize("name", ["llava", "qwen2_audio"])
def test_a_span_is_its_positions_alone(name: str) -> None:
    """A recorded span has one position per placeholder, padded on the left in shorter rows."""
    lens, batch = al.Lens(base(name)), BY_NAME[name].batch()
    medium = BY_NAME[name].media[0]
    sites = language(lens, "down_proj")
    all_of_it = lens.record(sites.at("residual"), batch)
    span = lens.record(sites.at("residual", span=medium), batch)
    placeholders = batch["input_ids"] == getattr(lens.model.config, f"{medium}_token_id")
    for point, part in zip(all_of_it, span, strict=True):
        passed = span[part]
        assert isinstance(passed, Activations)
        assert passed.chosen is not None
        assert torch.equal(placeholders.sum(1), passed.chosen.sum(1))
        assert torch.equal(all_of_it[point].values[placeholders], passed.rows)


def test_moments_are_those_of_the_values() -> None:
    """Mean, second moment and covariance over padded batches equal those in float64 over all rows."""
    lens, batch = al.Lens(base("llava")), BY_NAME["llava"].batch()
    points = language(lens, "gate_proj").at("input")
    values = lens.record(points, batch, batch)
    moments = lens.record(points, batch, batch, keep="second")
    for point in points:
        rows, found = values[point].rows.double(), moments[point]
        assert isinstance(found, Statistics)
        assert len(rows) == found.count == 2 * int(batch["attention_mask"].sum())
        torch.testing.assert_close(rows.mean(0), found.mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(rows.T @ rows / len(rows), found.second, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cov(rows.T, correction=0), found.covariance, rtol=1e-4, atol=1e-6)


def test_the_second_moment_weighs_a_change_by_behaviour() -> None:
    """‖ΔW·S^½‖² is the mean square of ΔW·x measured directly."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "gate_proj")[:1].at("input")
    delta = torch.randn_like(lens.parameter(points[0].site)).double()
    moments, values = (lens.record(points, batch, keep=keep)[points[0]] for keep in ("second", "values"))
    direct = (values.rows.double() @ delta.T).square().sum(1).mean()

    torch.testing.assert_close(direct, torch.trace(delta @ moments.second @ delta.T), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["residual", "gated"])
def test_gradients_are_what_a_small_step_does(name: str, kind: str) -> None:
    """The gradient along a direction equals the difference quotient from steering along it."""
    lens, batch = al.Lens(base(name)), BY_NAME[name].batch()
    points = language(lens, "down_proj")[:1].at(kind)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 3] - logits[:, 5]

    grads = [parameter.grad for parameter in lens.model.parameters()]
    found = lens.record(points, batch, metric=metric)[points[0]]
    direction = torch.randn(found.values.shape[-1], generator=torch.Generator().manual_seed(0))
    slope = float((found.gradients * direction).sum())
    step = 1e-2 / float(direction.norm())
    ends = []
    for alpha in (-step, step):
        with lens.intervene(al.Steer(points, vector=direction, alpha=alpha)):
            ends.append(float(metric(lens.run(batch)[:, -1]).double().sum()))
    assert slope == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=2e-2, abs=2e-3)
    assert all(one is p.grad for one, p in zip(grads, lens.model.parameters(), strict=True))


def test_gradients_are_those_of_one_reader() -> None:
    """The gradient at the input of q leaves out k and v, which read the same tensor."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    one, two = (language(lens, role)[:1].at("input") for role in ("q_proj", "v_proj"))
    found = lens.record(one | two, batch, metric=lambda logits: logits[:, 0])

    assert torch.equal(found[one[0]].values, found[two[0]].values)
    assert differ(found[one[0]].gradients, found[two[0]].gradients)


def test_without_parameters_that_learn_there_are_gradients_too() -> None:
    """A frozen model has gradients of its activations too."""
    model = BY_NAME["llama"].build().requires_grad_(False)
    lens, batch = al.Lens(model), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual")
    found = lens.record(points, batch, metric=lambda logits: logits[:, 0])
    alike = al.Lens(base("llama")).record(points, batch, metric=lambda logits: logits[:, 0])

    for point in points:
        assert torch.equal(alike[point].gradients, found[point].gradients)


def test_a_block_records_generation_step_by_step() -> None:
    """A recording of generation equals one pass over prompt and answer."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual")
    with lens.record(points) as recording:
        ids = lens.model.generate(**batch, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    longer = {"input_ids": ids[:, :-1]}
    longer["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
    at_once = lens.record(points, longer)
    for point in points:
        passed, whole = recording[point], at_once[point]
        assert whole.values.shape == passed.values.shape
        torch.testing.assert_close(whole.rows, passed.rows, rtol=1e-4, atol=1e-5)


def test_what_can_not_be_recorded_is_told() -> None:
    """Errors: an unknown `keep`, no points, gradients without values, a point not recorded or not reached."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual")
    with pytest.raises(LensError, match="can't record with keep='all'"):
        lens.record(points, batch, keep="all")
    with pytest.raises(NoSuchSite, match="no points"):
        lens.record(points[:0], batch)
    with pytest.raises(LensError, match="gradients need the values"):
        lens.record(points, batch, keep="mean", metric=lambda logits: logits[:, 0])
    with pytest.raises(NoSuchSite, match="was not recorded"):
        lens.record(points[:1], batch)[points[1]]
    with pytest.raises(LensError, match="nothing passed"):
        lens.record(points)[points[0]]
    with pytest.raises(NoSuchSite, match="no point 'gate'"):
        language(lens, "down_proj").at("gate")
    with pytest.raises(NoSuchSite, match=r"no span 'picture'.*Spans"):
        language(lens, "down_proj").at("output", span="picture")


def test_recording_leaves_no_hook() -> None:
    """A recording, complete or interrupted, leaves no hook."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual")
    with pytest.raises(RuntimeError, match="stop"):
        lens.record(points, batch, metric=stop)
    lens.record(points, batch)

    assert [] == [m for m in lens.model.modules() if m._forward_hooks or m._forward_pre_hooks]


def stop(logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("stop")
