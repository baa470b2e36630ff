"""The live model: same sites as on disk, changed exactly as asked, and put back to the bit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import affectlens as al
from affectlens.checkpoints.slicing import same_bits
from affectlens.errors import CheckpointError, LensError, NoSuchSite
from affectlens.lens.tower_sizes import tower_sizes
from affectlens.sites import Points
from tests.numbers import differ
from tests.small_models import nudge, tiny

FAMILIES = ("llama", "qwen2", "gemma2", "llava", "qwen2_5_vl", "gemma3")
DTYPES = (torch.float32, torch.bfloat16)


def snapshot(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Where every parameter and buffer lies, and its bits."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: (t.data_ptr(), t.detach().clone()) for name, t in tensors.items()}


def same(one: dict[str, tuple[int, torch.Tensor]], two: dict[str, tuple[int, torch.Tensor]]) -> bool:
    return one.keys() == two.keys() and all(
        one[name][0] == two[name][0] and same_bits(one[name][1], two[name][1]) for name in one
    )


def interventions(donor: nn.Module, sites: al.Sites) -> dict[str, object]:
    return {
        "transplant": al.Transplant(sites, donor=donor),
        "half": al.Transplant(sites, donor=donor, alpha=0.5),
        "zero": al.Zero(sites),
        "scale": al.Scale(sites, factor=1.5),
        "randomise": al.Randomise(sites),
        "shuffle": al.Shuffle(sites, donor=donor),
    }


@pytest.mark.parametrize("kind", ["transplant", "half", "zero", "scale", "randomise", "shuffle"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_restore_is_exact(
    kind: str, dtype: torch.dtype, family: str, error: type[BaseException] | None
) -> None:
    """After a block, normal or broken off, every tensor is the very one it was, flags and modes too."""
    model, donor = tiny(family).to(dtype), nudge(tiny(family), "layers").to(dtype)
    lens = al.Lens(model)
    before = snapshot(model)
    change = interventions(donor, lens.sites.where(role="mlp") | lens.sites.where(role="attention"))[kind]
    try:
        with lens.intervene(change):  # type: ignore[arg-type]
            assert not same(before, snapshot(model))
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error

    assert same(before, snapshot(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_transplanting_everything_gives_the_donor(family: str) -> None:
    """Base with all of tuned's weights is tuned, bit for bit; and back."""
    base, tuned = tiny(family), nudge(tiny(family), "")
    lens, ids = al.Lens(base), torch.arange(1, 9).reshape(1, -1)
    expected = [model(input_ids=ids).logits for model in (base, tuned)]

    with lens.intervene(al.Transplant(lens.sites, donor=tuned)):
        assert torch.equal(expected[1], base(input_ids=ids).logits)
    assert torch.equal(expected[0], base(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_zero_gate_is_zero_up_is_zero_down(family: str) -> None:
    """In a gated MLP without biases the three deletions are one, so none speaks for the gate."""
    model = tiny(family)
    lens, ids = al.Lens(model), torch.arange(1, 9).reshape(1, -1)
    logits = []
    for role in ("gate_proj", "up_proj", "down_proj"):
        with lens.intervene(al.Zero(lens.sites.where(role=role))):
            logits.append(model(input_ids=ids).logits)

    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert differ(logits[0], model(input_ids=ids).logits)


def test_interventions_compose_in_order() -> None:
    """The second sees what the first left, and all is undone."""
    base, tuned = tiny("llama"), nudge(tiny("llama"), "")
    lens = al.Lens(base)
    before, sites = snapshot(base), lens.sites.where(role="gate_proj")

    with lens.intervene(al.Zero(sites), al.Transplant(sites, donor=tuned, alpha=0.5)):
        for site in sites:
            assert torch.equal(0.5 * al.Lens(tuned).parameter(site), lens.parameter(site))
    assert same(before, snapshot(base))


def test_a_slice_of_a_fused_tensor_is_swapped_alone() -> None:
    """Zeroing q of a fused qkv leaves k and v as they were."""
    lens = al.Lens(tiny("qwen2_5_vl"))
    q, k = (lens.sites.where(tower="vision", role=role, param="weight") for role in ("q_proj", "k_proj"))
    before = lens.parameter(k[0]).clone()

    with lens.intervene(al.Zero(q)):
        assert not lens.parameter(q[0]).any()
        assert torch.equal(before, lens.parameter(k[0]))
    assert lens.parameter(q[0]).any()


def test_tied_weights_stay_tied() -> None:
    """A swap of the input embedding is one of the output embedding, inside and after."""
    model = tiny("gemma2")
    lens = al.Lens(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore[operator]
    assert embedding is head

    with lens.intervene(al.Zero(lens.sites.where(role="embed_tokens"))):
        assert not model.get_output_embeddings().weight.any()  # type: ignore[operator]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[operator]


def test_a_donor_that_does_not_fit_is_told_and_nothing_touched() -> None:
    """Other shapes or missing sites raise before any weight is swapped."""
    model = tiny("llama")
    lens, before = al.Lens(model), snapshot(model)
    with (
        pytest.raises(LensError, match="has shape"),
        lens.intervene(al.Transplant(lens.sites, donor=tiny("llama", intermediate_size=40))),
    ):
        pass
    with pytest.raises(NoSuchSite), lens.intervene(al.Transplant(al.Lens(tiny("llava")).sites, donor=model)):
        pass

    assert same(before, snapshot(model))


def test_a_thousand_blocks_leave_no_hook() -> None:
    """Entering and leaving many times leaves the modules as they were."""
    model = tiny("llama")
    lens = al.Lens(model)
    for _ in range(1000):
        with lens.intervene(al.Zero(lens.sites.where(role="gate_proj"))):
            pass

    assert [] == [
        m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
    ]


def test_a_missing_parameter_is_an_error_not_a_random_weight(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers would fill it with noise and a log line."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(pair[0] / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.1.mlp.gate_proj" in name))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((pair[0] / "config.json").read_bytes())

    with pytest.raises(LensError, match=r"lack model.language_model.layers.1.mlp.gate_proj.weight"):
        al.load(tmp_path)


def test_what_can_not_be_loaded_is_told(tmp_path: Path) -> None:
    """No config, or a dtype that there is none of."""
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        al.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(LensError, match="transformers can't load this"):
        al.load(tmp_path)
    with pytest.raises(LensError, match="unknown dtype 'float33'"):
        al.load(al.load_demo().base, dtype="float33")


def test_pictures_reach_the_model(lens: al.Lens, demo: al.Demo) -> None:
    """Two faces in one batch give two answers; the placeholder alone is refused."""
    faces = demo.task("faces-unseen")
    logits = lens.logits(*faces.examples[:2], prompt=faces.prompt)

    assert differ(logits[0], logits[1])
    with pytest.raises(LensError, match="1 placeholders for pictures"):
        lens.logits(al.Example("x", "happy", text="<image> feel"))


def test_padding_changes_no_answer(lens: al.Lens, demo: al.Demo) -> None:
    """An example gives the same logits alone and beside a longer one."""
    task = demo.task("sentences")
    short, long = sorted(task.examples, key=lambda e: len(e.text))[:: len(task) - 1]
    alone = lens.logits(short, prompt=task.prompt)
    beside = lens.logits(short, long, prompt=task.prompt)

    torch.testing.assert_close(alone[0], beside[0], atol=1e-4, rtol=1e-4)


def test_a_lens_without_processor_says_so() -> None:
    """Reading examples takes a processor."""
    with pytest.raises(LensError, match="no processor"):
        al.Lens(tiny("llama")).logits(al.Example("1", "x", text="x"))


def test_a_lens_shows_what_it_is(save: Callable[..., Path]) -> None:
    """Class, size, dtype and device in one line."""
    assert "LlamaForCausalLM" in repr(al.Lens(tiny("llama")))


def test_an_iterator_of_sites_works_twice() -> None:
    """A selection is kept, not used up; one site will do, none is an error."""
    model = tiny("llama")
    lens, ids = al.Lens(model), torch.arange(1, 9).reshape(1, -1)
    before = model(input_ids=ids).logits
    change = al.Zero(site for site in lens.sites.where(role="gate_proj"))
    for _ in range(2):
        with lens.intervene(change):
            assert differ(before, model(input_ids=ids).logits)
    with lens.intervene(al.Zero(lens.sites.where(role="gate_proj")[0])):
        assert differ(before, model(input_ids=ids).logits)
    with pytest.raises(NoSuchSite, match="would change nothing"):
        al.Transplant([], donor=model)


def test_the_diff_and_the_lens_read_the_same_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With one file and shards in a folder, both take what transformers takes."""
    shutil.copytree(pair[1], tmp_path / "both")
    shutil.copy(pair[0] / "model.safetensors", tmp_path / "both")
    checkpoint, lens = al.open_checkpoint(tmp_path / "both"), al.load(tmp_path / "both")

    assert all(torch.equal(checkpoint.read(site), lens.parameter(site)) for site in lens.sites)


def test_a_lens_shows_its_towers(lens: al.Lens) -> None:
    """Parameters and memory of the towers add up to those of the model."""
    rows = tower_sizes(lens.checkpoint, lens.parameters)

    assert [row[0] for row in rows] == ["language", "projector", "vision"]
    assert sum(row[1] for row in rows) == lens.checkpoint.parameters  # type: ignore[misc]
    assert "<td>language</td>" in lens._repr_html_()


def test_a_recording_shows_the_shapes_of_its_spans(lens: al.Lens, demo: al.Demo) -> None:
    """Positions without padding, by point and span; a point that nothing passed says so."""
    task = demo.tasks[0]
    gate = lens.sites.where(tower="language", role="gate_proj", layer=0)
    points = Points([*gate.at("output", span="image"), *gate.at("output")])
    examples = task.examples[:3]
    found = lens.record(points, *examples, prompt=task.prompt)._repr_html_()
    ids = lens.prepare(*examples, prompt=task.prompt)["attention_mask"]

    assert f'<td class="n">{int(ids.sum())}</td><td>float32</td>' in found
    assert "<td>image</td>" in found
    assert "nothing passed" in lens.record(points)._repr_html_()
    assert "sums over (352,)" in lens.record(points, *examples, prompt=task.prompt, keep="mean")._repr_html_()
