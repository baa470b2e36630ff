"""The state of a model's adapters is read when it is used: off, switched, rescaled, merged, added later."""

import copy
from collections.abc import Callable, Iterator

import peft
import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import CheckpointError, LensError
from tests.lens.families import BY_NAME, base, logits
from tests.lens.test_lens import same, snapshot
from tests.lens.test_wrapping import NAMES, TARGETS, adapted
from tests.numbers import differ

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter name 'a'"),
]
TEMPLATES = ("llama", "phi3", "gpt2")  # plain, fused, and stored the other way round


def two(name: str, **more: object) -> nn.Module:
    """A family with two random adapters, of which 'default' is active."""
    model = adapted(name, **more)  # type: ignore[arg-type]
    torch.manual_seed(6)
    settings = {"r": 2, "target_modules": TARGETS[name], "init_lora_weights": False,
                "fan_in_fan_out": name == "gpt2", **more}  # fmt: skip
    model.add_adapter("other", peft.LoraConfig(**settings))  # type: ignore[operator, arg-type]
    return model.eval()


def layers(model: nn.Module) -> Iterator[nn.Module]:
    yield from (part for part in model.modules() if hasattr(part, "set_scale"))


def rescaled(model: nn.Module) -> None:
    for layer in layers(model):
        layer.set_scale("default", 3.0)  # type: ignore[operator]


def partly_rescaled(model: nn.Module) -> None:
    next(layers(model)).scaling["default"] = 0.25  # type: ignore[index, operator]


STATES: dict[str, Callable[[nn.Module], object]] = {
    "active": lambda model: None,
    "switched": lambda model: model.set_adapter("other"),  # type: ignore[operator]
    "both": lambda model: model.base_model.set_adapter(["default", "other"]),  # type: ignore[operator, union-attr]
    "rescaled": rescaled,
    "one rescaled": partly_rescaled,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),  # type: ignore[operator, union-attr]
    "merged": lambda model: model.merge_adapter(),  # type: ignore[operator]
}


def merged_copy(model: nn.Module, state: str) -> nn.Module:
    """PEFT's own merge of the same state."""
    whole = copy.deepcopy(model)
    found: nn.Module = whole.unload() if state in ("disabled", "merged") else whole.merge_and_unload()  # type: ignore[operator]
    return found.eval()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_weights_are_those_of_the_state_that_the_model_is_in(name: str, state: str) -> None:
    """A lens made before the change reads and scales what PEFT merges; after the block all is as before."""
    model, batch = two(name), BY_NAME[name].batch()
    lens = al.Lens(model)
    sites = al.Sites(lens.checkpoint.factors)
    first = {site: lens.parameter(site).clone() for site in sites}
    STATES[state](model)
    whole = merged_copy(model, state)
    expected, before, computed = al.Lens(whole), snapshot(model), logits(model, batch)

    assert expected.sites == lens.sites
    for site in lens.sites:
        assert torch.allclose(expected.parameter(site).float(), lens.parameter(site).float(), atol=1e-5), site
    if state not in ("active", "merged", "one rescaled"):
        assert all(differ(first[site], lens.parameter(site)) for site in sites)
    plan = al.Scale(sites, factor=0.5), al.Zero(sites[:1])
    with expected.intervene(*plan), lens.intervene(*plan):
        assert torch.allclose(logits(whole, batch), logits(model, batch), rtol=0, atol=2e-5)
    assert same(before, snapshot(model))
    assert torch.equal(computed, logits(model, batch))


@pytest.mark.parametrize("name", NAMES)
def test_without_its_adapter_a_model_is_its_base(name: str) -> None:
    """Inside PEFT's block and with the lens without an adapter: runs, recordings, weights, interventions."""
    model, batch, plain = adapted(name), BY_NAME[name].batch(), al.Lens(base(name))
    lens = al.Lens(model)
    changed = al.Sites(lens.checkpoint.factors)
    points = al.Sites(s for s in changed if s.tower == "language" and s.param == "weight").at("output")
    on, off = lens.run(batch), lens.without_adapter()

    def checked(one: al.Lens) -> None:
        assert torch.allclose(plain.run(batch), one.run(batch), rtol=0, atol=1e-5)
        assert all(torch.equal(plain.parameter(site), one.parameter(site)) for site in lens.sites)
        recorded, expected = one.record(points, batch), plain.record(points, batch)
        for point in points:
            ours, theirs = (found[point].values for found in (recorded, expected))  # type: ignore[union-attr]
            assert torch.allclose(theirs, ours, rtol=0, atol=1e-4)
        plan = al.Scale(changed, factor=0.5)
        with one.intervene(plan), plain.intervene(plan):
            assert torch.allclose(plain.run(batch), one.run(batch), rtol=0, atol=1e-5)
            assert torch.allclose(logits(plain.model, batch), logits(model, batch), rtol=0, atol=1e-5)

    assert differ(on, plain.run(batch))
    checked(off)
    with model.disable_adapter():  # type: ignore[operator]
        checked(lens)
        checked(off)
    assert torch.equal(on, lens.run(batch))


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_without_its_adapter_is_a_donor(name: str) -> None:
    """Everything of it in the adapted model is the base; paired, it switches to the base and back."""
    model, batch = adapted(name), BY_NAME[name].batch()
    lens, before = al.Lens(model), snapshot(model)
    plain, on = al.Lens(base(name)).run(batch), lens.run(batch)
    with lens.intervene(al.Transplant(lens.sites, donor=lens.without_adapter())):
        assert torch.allclose(plain, lens.run(batch), rtol=0, atol=1e-5)
    with lens.paired(lens.without_adapter()).tuned():
        assert torch.allclose(plain, lens.run(batch), rtol=0, atol=1e-5)

    assert same(before, snapshot(model))
    assert torch.equal(on, lens.run(batch))


def test_a_donor_without_adapters_is_read_from_before_the_block() -> None:
    """Nested in a block that zeroed the base weights, they come back as they were."""
    lens = al.Lens(adapted("llama"))
    sites = al.Sites(lens.checkpoint.factors)
    with lens.intervene(al.Zero(sites)), lens.intervene(al.Transplant(sites, donor=lens.without_adapter())):
        assert all(torch.equal(al.Lens(base("llama")).parameter(s), lens.parameter(s)) for s in sites)


def test_a_lens_of_the_adapted_model_is_refused_while_the_adapters_are_off() -> None:
    """Its runs and weights would silently be those of the base."""
    lens, batch = al.Lens(adapted("llama")), BY_NAME["llama"].batch()
    off = lens.without_adapter()
    with off.intervene():
        with pytest.raises(LensError, match="switched the adapters off"):
            lens.run(batch)
        with pytest.raises(LensError, match="open them before"):
            off.intervene(al.Transplant(lens.sites, donor=lens)).__enter__()


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_adapter_that_is_added_later_counts(name: str) -> None:
    """Through PEFT or through transformers, after the lens has looked at the model."""
    batch = BY_NAME[name].batch()
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS[name], init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    for add in (
        lambda model: peft.get_peft_model(model, config),
        lambda model: model.add_adapter(config, "late"),
    ):
        model = BY_NAME[name].build()
        lens = al.Lens(model)
        sites, plain = lens.sites, lens.run(batch)
        add(model)
        model.eval()
        on = lens.run(batch)

        assert sites == lens.sites
        assert differ(plain, on)
        assert torch.allclose(plain, lens.without_adapter().run(batch), rtol=0, atol=1e-5)
        with lens.intervene(al.Scale(al.Sites(lens.checkpoint.factors), factor=1.0)):
            assert torch.allclose(on, lens.run(batch), rtol=0, atol=2e-5)


def test_the_switch_of_transformers_counts() -> None:
    """`disable_adapters` of a model with transformers' own integration."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    plain = lens.run(batch)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "x")  # type: ignore[operator]
    query = lens.sites.where(role="q_proj")[0]
    on = lens.parameter(query)
    model.disable_adapters()  # type: ignore[operator]

    assert differ(on, lens.parameter(query))
    assert torch.equal(al.Lens(base("llama")).parameter(query), lens.parameter(query))
    assert torch.allclose(plain, lens.run(batch), rtol=0, atol=1e-5)


def change_inside(model: nn.Module, what: str) -> Tensor:
    """Change the adapters and run the model; put them back."""
    batch = BY_NAME["llama"].batch()
    if what == "disabled":
        with model.disable_adapter():  # type: ignore[operator]
            return logits(model, batch)
    if what == "mixed":
        found: Tensor = model(**batch, adapter_names=["default", "__base__"]).logits
        return found
    STATES[what](model)
    return logits(model, batch)


@pytest.mark.parametrize("what", ["disabled", "switched", "rescaled", "merged", "mixed"])
def test_a_switch_inside_a_block_is_refused_where_it_matters(what: str) -> None:
    """The new weights were made for another state; where the block changed no adapted layer, it is fine."""
    model = two("llama")
    lens = al.Lens(model)
    adapted_sites, plain = al.Sites(lens.checkpoint.factors), lens.sites.where(role="o_proj", param="weight")
    with (
        lens.intervene(al.Scale(adapted_sites, factor=0.5)),
        pytest.raises(LensError, match=r"inside a block|adapter_names"),
    ):
        change_inside(model, what)

    model = two("llama")
    with al.Lens(model).intervene(al.Scale(plain, factor=1.0)):
        found = change_inside(model, what)
    assert torch.allclose(change_inside(two("llama"), what), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["merge_adapter", "unmerge_adapter"])
def test_a_merge_inside_a_block_is_undone_with_its_weights(change: str) -> None:
    """Neither the adapter's effect nor the base weights are lost."""
    model, batch = adapted("llama"), BY_NAME["llama"].batch()
    if change == "unmerge_adapter":
        model.merge_adapter()  # type: ignore[operator]
    lens = al.Lens(model)
    before = lens.run(batch)
    with lens.intervene(al.Scale(al.Sites(lens.sites.where(role="q_proj")), factor=2.0)):
        getattr(model, change)()

    assert torch.allclose(before, lens.run(batch), rtol=0, atol=2e-5)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_a_merge_inside_a_block_does_not_write_to_the_donor(state: str) -> None:
    """PEFT merges and unmerges in place, and inside the block the weights are the donor's own memory."""
    model, batch, donor = adapted("llama"), BY_NAME["llama"].batch(), base("llama")
    STATES[state](model)
    lens, before, expected = al.Lens(model), snapshot(donor), logits(model, batch)
    with lens.intervene(al.Transplant(lens.sites, donor=donor)):
        (model.unmerge_adapter if state == "merged" else model.merge_adapter)()  # type: ignore[operator]

    assert same(before, snapshot(donor))
    assert torch.equal(expected, logits(model, batch))


@pytest.mark.parametrize("points", [True, False], ids=["activations", "weights"])
def test_an_adapter_that_is_attached_inside_a_block_is_refused(points: bool) -> None:
    """It would wrap the modules that the block changes, and so bypass the block."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    queries = lens.sites.where(role="q_proj", param="weight")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    with lens.intervene(al.Zero(queries.at("output") if points else queries)):
        wrapped = peft.get_peft_model(model, config)
        with pytest.raises(LensError, match="attached or removed inside a block"):
            logits(wrapped, batch)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_lens_without_its_adapter_is_a_block_too(name: str) -> None:
    """Inside it every lens on the model is the base; after it, also an interrupt, the adapters are back."""
    model, batch, plain = adapted(name), BY_NAME[name].batch(), al.Lens(base(name))
    lens, before = al.Lens(model), snapshot(model)
    on, changed = lens.run(batch), al.Sites(lens.checkpoint.factors)
    with lens.without_adapter() as off:
        assert all(torch.equal(plain.parameter(site), lens.parameter(site)) for site in lens.sites)
        for one in (lens, off):
            assert torch.allclose(plain.run(batch), one.run(batch), rtol=0, atol=1e-5)
            with plain.intervene(al.Scale(changed, factor=2.0)), one.intervene(al.Scale(changed, factor=2.0)):
                assert torch.allclose(plain.run(batch), one.run(batch), rtol=0, atol=1e-5)
    assert torch.equal(on, lens.run(batch))
    with pytest.raises(KeyboardInterrupt), lens.without_adapter():
        raise KeyboardInterrupt

    assert torch.equal(on, lens.run(batch))
    assert same(before, snapshot(model))
    with pytest.raises(LensError, match="a lens is no block"), lens:
        pytest.fail("the block was entered")


OTHERS: dict[str, peft.PeftConfig] = {
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False),
    "vera": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_lora_weights=False),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_have_sites_and_points_but_no_weights(kind: str) -> None:
    """Sites never refuse; weights that such an adapter changes are refused by its name until it is off."""
    plain, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    model = peft.get_peft_model(BY_NAME["llama"].build(), copy.deepcopy(OTHERS[kind])).eval()
    lens = al.Lens(model)
    site = lens.sites.where(role="k_proj" if kind == "ia3" else "q_proj", param="weight")[0]

    assert plain.sites == lens.sites
    for use in (lambda: lens.parameter(site), lens.intervene(al.Zero(site)).__enter__):
        with pytest.raises(CheckpointError, match=f"default is of kind {kind}"):
            use()
    with lens.intervene(al.Zero(al.Sites([site]).at("output"))):
        lens.run(batch)
    off = lens.without_adapter()
    assert torch.equal(plain.parameter(site), off.parameter(site))
    assert torch.allclose(plain.run(batch), off.run(batch), atol=1e-5)


def test_several_dora_adapters_are_named_where_they_are_read() -> None:
    """Their changes can't be added up; the sites are there, and each alone is read."""
    model = two("llama", use_dora=True)
    lens = al.Lens(model)
    site = next(iter(lens.checkpoint.factors))
    alone = lens.parameter(site)
    STATES["both"](model)

    assert al.Lens(base("llama")).sites == lens.sites
    with pytest.raises(CheckpointError, match=r"several adapters are active \(default, other\)"):
        lens.parameter(site)
    model.set_adapter("default")  # type: ignore[operator]
    assert torch.equal(alone, lens.parameter(site))


def test_a_model_without_adapters_says_so() -> None:
    """And a merged adapter, which can't be switched off without a change of weights."""
    with pytest.raises(LensError, match="has no adapter"):
        al.Lens(base("llama")).without_adapter()
    model = adapted("llama")
    model.merge_adapter()  # type: ignore[operator]
    with pytest.raises(LensError, match="unmerge_adapter"):
        al.Lens(model).without_adapter().run(BY_NAME["llama"].batch())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_checkpoint_that_is_kept_is_not_read_after_a_merge(name: str) -> None:
    """Its adapter would count twice; switched, it is still the adapter that was active."""
    model = two(name)
    kept = al.open_checkpoint(model)
    site = next(iter(kept.factors))
    expected = kept.read(site).clone()
    model.set_adapter("other")  # type: ignore[operator]

    assert torch.equal(expected, kept.read(site))
    model.merge_adapter()  # type: ignore[operator]
    for one in (kept, kept.untouched):
        with pytest.raises(CheckpointError, match=r"merged or unmerged since.*Open it again"):
            one.read(site)


def test_a_pair_is_made_again_after_a_switch() -> None:
    """What differs was measured with another state of the adapters."""
    model = adapted("llama")
    pair = al.Lens(model).paired(base("llama"))
    with model.disable_adapter(), pytest.raises(LensError, match="pair it again"), pair.tuned():  # type: ignore[operator]
        pytest.fail("the block was entered")


class Packed(nn.Linear):
    """A matrix that is stored in 8 bits, as one column."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.size, self.step = like.weight.shape, like.weight.detach().abs().max() / 127
        whole = (like.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(whole.reshape(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.step).reshape(self.size))


def test_quantised_layers_keep_their_sites_and_points() -> None:
    """Below an adapter or not: their values are refused, and their activations pass as usual."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    plain = al.Lens(model).run(batch)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lens = al.Lens(peft.get_peft_model(model, config))
    query, value = (lens.sites.where(role=role, layer=0) for role in ("q_proj", "v_proj"))
    head = al.Sites([query[0].at(head=1)]).at("output")

    assert al.Lens(base("llama")).sites == lens.sites
    assert torch.allclose(plain, lens.without_adapter().run(batch), rtol=0, atol=1e-5)
    assert 16 == lens.record(head, batch)[head[0]].values.shape[-1]  # type: ignore[union-attr]
    for one in (lens, lens.without_adapter()):
        with pytest.raises(CheckpointError, match="quantised"):
            one.parameter(query[0])
        with pytest.raises((LensError, CheckpointError), match="quantised"), one.intervene(al.Zero(query)):
            pytest.fail("the block was entered")
    before = lens.run(batch)
    with lens.intervene(al.Scale(value, factor=1.0)):
        assert torch.allclose(before, lens.run(batch), atol=1e-5)


def test_activations_of_a_mixed_batch_are_those_of_each_row() -> None:
    """With `adapter_names=`, each row is recorded and changed as it is computed."""
    model, batch = two("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    point = lens.sites.where(role="q_proj", layer=0, param="weight").at("output")
    with lens.record(point) as mixed:
        model(**batch, adapter_names=["other", "__base__"])
    model.set_adapter("other")  # type: ignore[operator]
    rows = [lens.record(point, batch), lens.without_adapter().record(point, batch)]
    for number, alone in enumerate(rows):
        expected, found = (one[point[0]].values[number] for one in (alone, mixed))  # type: ignore[union-attr]
        assert torch.allclose(expected, found, rtol=0, atol=1e-5)
    seen: list[Tensor] = []
    output = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with lens.intervene(al.Zero(point)):
        handle = output.register_forward_hook(lambda _, __, out: seen.append(out))
        model(**batch, adapter_names=["other", "__base__"])
        handle.remove()

    assert not seen[0].any()


def test_a_task_is_answered_with_and_without_the_adapter() -> None:
    """`evaluate` of the lens without its adapter is that of the base, in both ways."""
    demo = al.load_demo()
    task, plain = demo.tasks[1].head(4), al.load(demo.base, dtype="float32")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    lens = al.Lens(peft.get_peft_model(al.load(demo.base, dtype="float32").model, config), plain.processor)
    expected, off, on = (al.evaluate(one, task) for one in (plain, lens.without_adapter(), lens))
    written = [al.evaluate(one, task, answer="greedy").frame for one in (plain, lens.without_adapter())]

    assert torch.allclose(
        torch.tensor(expected.frame["logp"].to_numpy()), torch.tensor(off.frame["logp"].to_numpy()), atol=1e-4
    )
    assert not torch.allclose(
        torch.tensor(expected.frame["logp"].to_numpy()), torch.tensor(on.frame["logp"].to_numpy()), atol=1e-3
    )
    assert written[0].equals(written[1])
