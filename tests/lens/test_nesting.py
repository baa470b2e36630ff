"""Nested blocks, a second model inside a block, and donors that depend on the changed weights."""

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import LensError
from tests.lens.families import BY_NAME, base, logits, tuned
from tests.lens.test_lens import same, snapshot
from tests.lens.test_paired import adapted
from tests.small_models import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]


@pytest.fixture(params=["llama", "phi3"])
def lora(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, nn.Module]:
    """Return a family, an adapter for it on disk, and the model with the adapter merged by PEFT."""
    targets = ["gate_up_proj", "qkv_proj"] if request.param == "phi3" else ["gate_proj", "q_proj"]
    wrapped = adapted(BY_NAME[request.param].build(), targets)
    wrapped.save_pretrained(tmp_path)  # type: ignore[operator]
    return request.param, tmp_path, wrapped.merge_and_unload()  # type: ignore[operator]


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-5, atol=1e-5)


def gates(lens: al.Lens) -> al.Sites:
    return lens.sites.where(role="gate_proj")


@pytest.mark.parametrize("change", ["zero", "revert", "scale", "half"])
def test_what_is_changed_inside_the_second_model_is_changed(
    lora: tuple[str, Path, nn.Module], change: str
) -> None:
    """Interventions inside `pair.tuned()`, held as factors, act as they do on the merged model."""
    name, folder, merged = lora
    model, batch = BY_NAME[name].build(), BY_NAME[name].batch()
    lens, other = al.Lens(model), al.Lens(merged)
    before = snapshot(model)

    def make(sites: al.Sites) -> Any:
        return {
            "zero": al.Zero(sites),
            "revert": al.Transplant(sites, donor=BY_NAME[name].build()),
            "scale": al.Scale(sites, factor=0.5),
            "half": al.Transplant(sites, donor=BY_NAME[name].build(), alpha=0.5),
        }[change]

    with other.intervene(make(gates(other))):
        expected = logits(merged, batch)
    plain = logits(merged, batch)
    pair = lens.paired(folder)
    with pair.tuned():
        assert close(plain, logits(model, batch))
        with lens.intervene(make(gates(lens))):
            assert close(expected, logits(model, batch))
            assert not close(plain, logits(model, batch))
        assert close(plain, logits(model, batch))
        assert close(other.parameter(gates(other)[0]), lens.parameter(gates(lens)[0]))

    assert same(before, snapshot(model))
    assert [] == [m for m in model.modules() if m._forward_hooks]


@pytest.mark.parametrize("nested", [True, False])
def test_an_adapter_is_a_donor_over_the_weights_as_they_were(
    lora: tuple[str, Path, nn.Module], nested: bool
) -> None:
    """An adapter as donor is applied to the original weights: not to changed ones, and not twice."""
    name, folder, merged = lora
    model, batch = BY_NAME[name].build(), BY_NAME[name].batch()
    lens, other = al.Lens(model), al.Lens(merged)
    changed = al.Sites(al.open_checkpoint(folder, base=model).factors) - lens.sites.where(role="q_proj")
    put = al.Transplant(changed, donor=folder)
    with other.intervene(al.Zero(other.sites.where(role="q_proj"))):
        expected = logits(merged, batch)
    blank = al.Zero(lens.sites.where(role="q_proj") | gates(lens))
    with quiet():
        if nested:
            with lens.intervene(blank), lens.intervene(put), lens.intervene(put):
                found = logits(model, batch)
        else:
            with lens.intervene(blank, put, put):
                found = logits(model, batch)

    assert close(expected, found)


def test_a_held_model_is_a_donor_whatever_holds() -> None:
    """A held model as donor takes the sites that do not differ from the original base."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    other = BY_NAME["llama"].build()
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight += 0.01  # type: ignore[index, operator, union-attr]
    pair = lens.paired(other)
    with lens.intervene(al.Zero(lens.sites), al.Transplant(lens.sites, donor=pair.donor)):
        assert torch.equal(logits(other, batch), logits(model, batch))


def test_a_pair_made_or_loaded_inside_a_block_is_none_of_it() -> None:
    """A pair made or loaded inside a block ignores the block's changes."""
    model, batch = BY_NAME["phi3"].build(), BY_NAME["phi3"].batch()
    other = BY_NAME["phi3"].build()
    lens = al.Lens(model)
    with torch.no_grad():
        width = lens.parameter(gates(lens)[0]).shape[0]
        other.model.layers[0].mlp.gate_up_proj.weight[:width] += 0.01  # type: ignore[index, union-attr]
    with lens.intervene(al.Zero(lens.sites.where(role="up_proj"))):
        pair = lens.paired(other)
        with pair.tuned():
            pass

    assert {"gate_proj"} == {site.role for site in pair.differing}
    with pair.tuned():
        assert torch.equal(logits(other, batch), logits(model, batch))


def test_a_block_is_entered_once_at_a_time() -> None:
    """A block entered inside itself is an error; after it is left, it can be entered again."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    plain, pair = logits(model, batch), lens.paired(tuned("llama"))
    points = gates(lens).at("gated")
    for block in (lens.intervene(al.Zero(points)), lens.record(points), pair.tuned()):
        with block:
            inside = logits(model, batch)
            with pytest.raises(LensError, match="already active"), block:
                pass
            assert torch.equal(inside, logits(model, batch))
        with block:
            assert torch.equal(inside, logits(model, batch))
        assert torch.equal(plain, logits(model, batch))


def test_a_recording_keeps_no_model() -> None:
    """A recording keeps neither the model nor its input in memory."""
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    points = gates(al.Lens(model)).at("gated")
    recording, known = al.Lens(model).record(points, batch), weakref.ref(model)
    del model
    gc.collect()

    assert known() is None
    assert recording[points[0]].values.shape[:2] == batch["input_ids"].shape
    with pytest.raises(LensError, match="is gone"), recording:
        pass


def test_two_batches_are_two_also_of_logits() -> None:
    """In a recording, a second batch follows as rows, not as further steps of the first."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = lens.sites.where(role="lm_head").at("output")
    with lens.record(points) as recording:
        lens.run(batch)
        lens.run({name: tensor[:1] for name, tensor in batch.items()})

    assert (3, 1) == recording[points[0]].values.shape[:2]


def test_a_tower_is_patched_from_its_first_row_in_each_pass() -> None:
    """A tower is patched from its first recorded row in each pass; left-over rows are an error."""
    lens, batch = al.Lens(base("llava")), BY_NAME["llava"].batch()
    points = lens.sites.where(tower="vision", role="fc2")[:1].at("output")
    recording = lens.record(points, batch)
    with lens.intervene(al.Patch(points, source=recording)):
        first, again = lens.run(batch), lens.run(batch)
    assert torch.equal(first, again)
    half = {name: tensor[:1] for name, tensor in batch.items()}
    half["pixel_values"] = batch["pixel_values"][: len(batch["pixel_values"]) // 2]
    with lens.intervene(al.Patch(points, source=recording)):
        lens.run(half)
        with pytest.raises(LensError, match="rows passed"):
            lens.run(half)


@pytest.mark.parametrize("family", ["t5_gated", "t5gemma", "llama"])
def test_what_is_generated_beyond_a_recording_keeps_its_own(family: str) -> None:
    """A recording of one token is patched at that token, not at each step of generation."""
    lens, batch = al.Lens(base(family)), BY_NAME[family].batch()
    if family == "llama":
        batch = {name: tensor[:, -1:] for name, tensor in batch.items()}
    sites = lens.sites.where(tower="language", role="down_proj")
    points = al.Sites(site for site in sites if site.stack != "encoder" and site.param == "weight").at(
        "residual"
    )
    given = {n: t for n, t in batch.items() if n != "decoder_input_ids"}
    recording = lens.record(points, given)

    def generate() -> torch.Tensor:
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
        return torch.stack(lens.model.generate(**given, **settings, return_dict_in_generate=True).logits)

    plain = generate()
    with lens.intervene(al.Patch(points, source=recording)):
        assert torch.equal(plain, generate())


def test_the_last_token_is_each_rows_own() -> None:
    """With padding on the right, the last token of a row is the one before the padding."""
    lens = al.Lens(base("llama"))
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    points = gates(lens).at("gated", span="last")
    whole = lens.record(gates(lens).at("gated"), {"input_ids": ids, "attention_mask": mask})
    last = lens.record(points, {"input_ids": ids, "attention_mask": mask})
    values = whole[whole.points[0]].values

    assert torch.equal(torch.stack([values[0, 3], values[1, 5]])[:, None], last[points[0]].values)


@pytest.mark.parametrize(
    ("model_type", "attention"), [("mistral", "eager"), ("mistral", "sdpa"), ("gemma2", "eager")]
)
def test_a_knockout_follows_a_sliding_window(model_type: str, attention: str) -> None:
    """A knockout over a sliding cache has the logits of one pass over all tokens."""
    model: Any = tiny(model_type, sliding_window=6)
    model.set_attn_implementation(attention)
    model.config.sliding_window = 6
    lens, ids = al.Lens(model), torch.arange(3, 12).reshape(1, -1)
    sites = lens.sites.where(role="o_proj")
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "use_cache": True}
    with lens.intervene(al.Knockout(sites, source=8, target="generated")):
        out = model.generate(ids, **settings, output_logits=True, return_dict_in_generate=True)
    with lens.intervene(al.Knockout(sites, source=8, target=(9, 10, 11))):
        whole = model(input_ids=out.sequences[:, :-1]).logits
    plain = model(input_ids=out.sequences[:, :-1]).logits

    found = torch.stack(out.logits, 1)
    torch.testing.assert_close(whole[:, 8:], found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[:, 9:], whole[:, 9:], atol=1e-3)


def test_a_knockout_across_is_of_the_encoders_tokens() -> None:
    """A knockout of an encoder's token in the decoder equals masking that token's key."""
    model: Any = BY_NAME["t5gemma"].build()
    model.set_attn_implementation("eager")
    lens, batch = al.Lens(model), BY_NAME["t5gemma"].batch()
    across = al.Sites(s for s in lens.sites.where(role="o_proj", stack="decoder") if "cross" in repr(s))
    assert len(across) > 0
    plain = lens.run(batch)
    with lens.intervene(al.Knockout(across, source=1, target=None)):
        found = lens.run(batch)
    hidden = dict(batch)
    mask = batch["attention_mask"].clone()
    number = mask.cumsum(1) - 1
    mask[(number == 1) & mask.bool()] = 0
    encoder = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hidden = {"encoder_outputs": encoder, "attention_mask": mask, "decoder_input_ids": started(lens, batch)}
    expected = model(**hidden, use_cache=False).logits[:, -1:]

    torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, found, atol=1e-4)


def started(lens: al.Lens, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from affectlens.lens.running import started as begun

    return begun(lens.model, batch)["decoder_input_ids"]


def test_a_routers_scores_are_read_by_nobody() -> None:
    """The scores of a router can be recorded; to change them is an error, as no module reads them."""
    lens, batch = al.Lens(base("qwen2_moe")), BY_NAME["qwen2_moe"].batch()
    points = lens.sites.where(role="router").at("output")

    assert len(lens.record(points, batch)[points[0]].values)
    with pytest.raises(LensError, match="no module reads its scores"), lens.intervene(al.Zero(points)):
        pass


def test_the_live_model_is_a_donor_as_it_was() -> None:
    """The live model as donor gives its original weights, whatever has changed."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    everything = al.Transplant(lens.sites, donor=tuned("llama"))
    with lens.intervene(everything, al.Transplant(gates(lens), donor=BY_NAME["llama"].build())):
        expected = logits(model, batch)
    for itself in (model, lens.checkpoint):
        with lens.intervene(everything, al.Transplant(gates(lens), donor=itself)):
            assert torch.equal(expected, logits(model, batch))


def test_tuned_is_tuned_whatever_holds(lora: tuple[str, Path, nn.Module]) -> None:
    """`pair.tuned()` inside a block that zeroes base's matrices is still tuned."""
    name, folder, merged = lora
    model, batch = BY_NAME[name].build(), BY_NAME[name].batch()
    lens = al.Lens(model)
    pair = lens.paired(folder)
    with quiet(), lens.intervene(al.Zero(al.Sites(pair.differing))), pair.tuned():
        assert close(logits(merged, batch), logits(model, batch))


def test_a_part_of_a_fused_matrix_pairs_with_the_whole(tmp_path: Path) -> None:
    """A file with the gates of a fused matrix leaves up unchanged."""
    from safetensors.torch import save_file

    model, batch = BY_NAME["phi3"].build(), BY_NAME["phi3"].batch()
    lens = al.Lens(model)
    name = "model.layers.0.mlp.gate_proj.weight"
    save_file({name: lens.parameter(gates(lens)[0]) + 0.1}, tmp_path / "gates.safetensors")
    with lens.intervene(al.Transplant(gates(lens)[0], donor=tmp_path / "gates.safetensors")):
        expected = logits(model, batch)
    with lens.paired(tmp_path / "gates.safetensors").tuned():
        assert torch.equal(expected, logits(model, batch))


def quiet() -> Any:
    return warnings.catch_warnings(action="ignore")
