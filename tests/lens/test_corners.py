"""Cases where an intervention could silently have no effect, or a different one."""

import os
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import affectlens as al
from affectlens.errors import LensError, NoSuchSite, Remark
from affectlens.lens.inputs.choices import Choices
from affectlens.lens.running import started
from affectlens.lens.scoring import label_logps
from tests.lens.families import BY_NAME, base, logits, tuned
from tests.lens.test_lens import same, snapshot
from tests.numbers import differ
from tests.tiny_models import _AT_BIRTH
from tests.tiny_models import tiny as of_type


def language(lens: al.Lens, role: str) -> al.Sites:
    sites = lens.sites.where(tower="language", role=role, param="weight")
    return al.Sites(site for site in sites if site.stack != "encoder")


def logp_of(lens: al.Lens, batch: dict[str, torch.Tensor], ids: tuple[int, ...]) -> torch.Tensor:
    """Return the log-probability of one label behind each prompt of a batch."""
    rows = len(batch.get("decoder_input_ids", batch.get("input_ids", ())))
    return label_logps(lens.model, Choices(batch, ((ids,),) * rows))[:, 0]


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "t5_gated"])
@pytest.mark.parametrize("kind", ["zero", "steer", "patch"])
def test_a_given_answer_is_no_part_of_the_prompt(family: str, kind: str) -> None:
    """A label's log-probability under a change of the last prompt token equals that from the prompt alone."""
    lens, batch = al.Lens(base(family)), BY_NAME[family].batch()
    batch.pop("decoder_input_ids", None)
    batch = started(lens.model, batch)
    points = language(lens, "down_proj").at("residual", span="last")
    width = lens.parameter(points[0].site).shape[0]
    change = {
        "zero": al.Zero(points[:1]),
        "steer": al.Steer(points[:1], vector=torch.ones(width)),
        "patch": al.Patch(points[:1], source=al.Lens(tuned(family)).record(points[:1], batch)),
    }[kind]
    plain = logp_of(lens, batch, (7,))
    with lens.intervene(change):
        expected = lens.run(batch)[:, -1].log_softmax(-1)[:, 7]
        found = logp_of(lens, batch, (7,))

    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, found, atol=1e-3)


def test_an_answer_is_what_is_generated() -> None:
    """A given answer belongs to the span `generated`, and to no span of the prompt."""
    lens = al.Lens(base("llama"))
    ids = torch.arange(3, 11).reshape(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    counts = {}
    for span in ("prompt", "text", "last", "generated"):
        with lens.record(language(lens, "down_proj")[:1].at("residual", span=span)) as recording:
            lens.run(batch, answer=3)
        counts[span] = recording[recording.points[0]].values.shape[1]

    assert {"prompt": 5, "text": 5, "last": 1, "generated": 3} == counts


def test_what_is_given_is_not_written_into() -> None:
    """An edit of a site and of a part of it writes neither into the donor nor into the live model."""
    model, donor = BY_NAME["llama"].build(), BY_NAME["llama"].build(seed=1)
    lens = al.Lens(model)
    gate = language(lens, "gate_proj")[0]
    before, theirs = snapshot(model), snapshot(donor)

    class Both:
        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def edits(self, live: al.Checkpoint) -> dict[al.Site, torch.Tensor]:
            one = gate.at(neuron=3)
            return {gate: self.values, one: torch.zeros(live.shape(one))}

    for values in (al.Lens(donor).parameter(gate), lens.parameter(gate)):
        with lens.intervene(Both(values)):
            assert not lens.parameter(gate)[3].any()
            assert torch.equal(values[4:], lens.parameter(gate)[4:])

    assert same(before, snapshot(model))
    assert same(theirs, snapshot(donor))


@pytest.mark.parametrize("order", ["weights first", "weights last"])
def test_blocks_may_end_in_any_order(order: str) -> None:
    """Blocks may be left in any order: each stays in effect until its end, then all is as before."""
    model = BY_NAME["llama"].build()
    lens, batch = al.Lens(model), BY_NAME["llama"].batch()
    gates = language(lens, "gate_proj")
    before, plain = snapshot(model), logits(model, batch)
    one, two = lens.intervene(al.Zero(gates)), lens.intervene(al.Scale(gates, factor=3.0))
    first, second = (one, two) if order == "weights first" else (two, one)
    first.__enter__()
    second.__enter__()
    inside = logits(model, batch)
    first.__exit__(None, None, None)
    assert torch.equal(inside, logits(model, batch))
    second.__exit__(None, None, None)

    assert torch.equal(plain, logits(model, batch))
    assert same(before, snapshot(model))


def test_a_batch_without_the_medium_keeps_its_rows() -> None:
    """Row k of a recording is example k, also in a batch without pictures."""
    lens, batch = al.Lens(base("llava")), BY_NAME["llava"].batch()
    text = {"input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"]}
    text["input_ids"][BY_NAME["llava"].span(batch, "image")] = 7
    points = language(lens, "down_proj")[:1].at("residual", span="image")
    found = lens.record(points, batch, text, batch)[points[0]]

    assert 6 == len(found.values)
    assert [True, True, False, False, True, True] == found.chosen.any(1).tolist()


def test_examples_and_batches_are_recorded_in_the_order_given(lens: al.Lens, demo: al.Demo) -> None:
    """Rows of a recording have the order of the arguments, examples and batches mixed."""
    task = demo.task("faces-unseen")
    points = lens.sites.where(tower="language", role="down_proj")[:1].at("residual", span="last")
    one, two, three = task.examples[:3]
    batch = lens.prepare(two, prompt=task.prompt)
    mixed = lens.record(points, one, batch, three, prompt=task.prompt)[points[0]].values
    alone = [lens.record(points, x, prompt=task.prompt)[points[0]].values for x in (one, two, three)]

    torch.testing.assert_close(torch.cat(alone), mixed)


def test_a_bias_has_no_features_of_the_input() -> None:
    """A part of a fused bias at the input is the whole input; a head of it is an error."""
    lens, batch = al.Lens(base("gpt2")), BY_NAME["gpt2"].batch()
    bias = lens.sites.where(role="k_proj", param="bias")[0]
    points = al.Sites([bias]).at("input")

    assert 64 == lens.record(points, batch)[points[0]].values.shape[-1]
    with pytest.raises(LensError, match="a bias is added to the output"):
        lens.record(al.Sites([bias.at(head=1)]).at("input"), batch)


def test_the_features_of_a_convolution_come_last() -> None:
    """Channels of a convolution, the second dimension, are averaged and steered like features."""
    lens, batch = al.Lens(base("llava")), BY_NAME["llava"].batch()
    site = lens.sites.where(tower="vision", role="patch_embed", param="weight")[0]
    points = al.Sites([site]).at("output")
    channels = lens.parameter(site).shape[0]
    plain = lens.record(points, batch)[points[0]].values
    vector = torch.arange(channels).float()
    with lens.intervene(al.Steer(points, vector=vector)):
        found = lens.record(points, batch)[points[0]].values

    assert channels == plain.shape[-1]
    torch.testing.assert_close(plain + vector, found)
    assert (channels,) == lens.record(points, batch, keep="mean")[points[0]].mean.shape


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_norms_of_heads_have_positions(model_type: str) -> None:
    """Norms of heads, with heads before or after positions: spans select tokens, padding is left out."""
    lens = al.Lens(of_type(model_type))
    site = lens.sites.where(role="q_norm")[0]
    ids = torch.arange(3, 17).reshape(2, 7)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}
    point = al.Sites([site]).at("output")[0]
    heads = lens.checkpoint.units(lens.sites.where(role="q_proj")[0])
    assert heads is not None
    passed = lens.record(al.Sites([site]).at("output"), batch)[point]
    moments = lens.record(al.Sites([site]).at("output"), batch, keep="second")[point]

    assert (2, 7) == passed.values.shape[:2]
    assert 12 * heads.count == moments.count == len(passed.rows)
    torch.testing.assert_close(
        passed.rows.double().T @ passed.rows.double() / len(passed.rows), moments.second
    )
    with lens.intervene(al.Zero(al.Sites([site]).at("output", span="last"))):
        zeroed = lens.record(al.Sites([site]).at("output"), batch)[point].values
    assert not zeroed[:, -1].any()
    assert torch.equal(passed.values[:, :-1], zeroed[:, :-1])


def test_counters_are_transplanted_as_they_are() -> None:
    """Integer buffers, such as the counters of batch norms, are transplanted too."""
    model, donor = of_type("granite_speech"), of_type("granite_speech", seed=1)
    lens = al.Lens(model)
    for name, buffer in donor.named_buffers():
        if "num_batches_tracked" in name:
            buffer += 5
    counters = [site for site in lens.sites if "int" in lens.checkpoint.dtype(site)]
    assert counters
    with lens.intervene(al.Transplant(lens.sites, donor=donor)):
        assert all(5 == int(lens.parameter(site)) for site in counters)
    assert all(0 == int(lens.parameter(site)) for site in counters)


def test_a_model_that_was_cast_since_is_changed_all_the_same() -> None:
    """After a cast, which makes new buffers, the new ones are swapped."""
    model = of_type("granite_speech")
    lens = al.Lens(model)
    assert len(lens.sites) > 0
    model.to(torch.bfloat16)
    variances = al.Sites(site for site in lens.sites if "running_var" in site.parameter)
    with lens.intervene(al.Zero(variances)):
        assert not any(b.any() for name, b in model.named_buffers() if name.endswith("running_var"))
    assert all(b.any() for name, b in model.named_buffers() if name.endswith("running_var"))


def test_what_is_recorded_is_not_written_into() -> None:
    """A model that writes in place, as Falcon does, does not change a recording that is patched in."""
    model: Any = of_type("falcon")
    lens, ids = al.Lens(model), torch.arange(3, 11).reshape(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    points = lens.sites.where(role="fc2").at("output")
    recording = lens.record(points, batch)
    values = [recording[point].values.clone() for point in points]
    plain = lens.run(batch)
    for change in (al.Patch(points, source=recording), al.Mean(points, over=recording)):
        with lens.intervene(change):
            found = [lens.run(batch) for _ in range(2)]
        assert torch.equal(*found)
        assert isinstance(change, al.Mean) == differ(plain, found[0])

    assert all(torch.equal(old, recording[point].values) for old, point in zip(values, points, strict=True))


def test_layers_of_another_kind_of_attention_are_refused() -> None:
    """A knockout of a linear attention layer is an error; the other layers work."""
    lens = al.Lens(of_type("qwen3_next"))
    kinds = lens.model.config.layer_types  # type: ignore[union-attr]
    assert {"linear_attention", "full_attention"} == set(kinds)
    ids = torch.arange(3, 11).reshape(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for site in lens.sites.where(role="o_proj"):
        cut = al.Knockout(site, source=0, target="last")
        if kinds[site.layer] == "linear_attention":
            with (
                pytest.raises(LensError, match="has no scores of queries and keys to mask"),
                lens.intervene(cut),
            ):
                pass
        else:
            with lens.intervene(cut):
                changed = lens.run(batch)
            assert differ(changed, lens.run(batch))


def test_beams_are_followed() -> None:
    """With tuned's residual and head, a beam search gives tuned's tokens: its cache is reordered too."""
    one, other = base("llama"), tuned("llama")
    lens, batch = al.Lens(one), BY_NAME["llama"].batch()
    stream = language(lens, "down_proj")[-1:].at("residual")
    rest = al.Sites(site for site in lens.sites if site.layer is None)
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "early_stopping": True}
    expected = other.generate(**batch, **settings)  # type: ignore[operator]
    with lens.intervene(al.Transplant(rest, donor=other), al.Patch(stream, source=al.Lens(other))):
        found = one.generate(**batch, **settings)  # type: ignore[operator]

    assert torch.equal(expected, found)


def test_recordings_and_what_uses_them_travel() -> None:
    """An unpickled patch does the same; an unpickled recording can be read but not entered."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual")
    recording = al.Lens(tuned("llama")).record(points, batch)
    patch = al.Patch(points, source=recording)
    again = pickle.loads(pickle.dumps(patch))
    found = []
    for one in (patch, again):
        with lens.intervene(one):
            found.append(lens.run(batch))

    assert torch.equal(*found)
    with pytest.raises(LensError, match="is gone"), again.source:
        pass


def test_spans_are_names_or_numbers_of_any_kind() -> None:
    """NumPy integers and lists become plain integers and tuples; anything else is an error."""
    import numpy as np

    gates = al.Lens(base("llama")).sites.where(role="gate_proj")

    assert gates.at("gated", span=3) == gates.at("gated", span=np.int64(3))
    assert gates.at("gated", span=(1, 2)) == gates.at("gated", span=[1, np.int64(2)])
    for wrong in (1.5, (2, "last"), slice(3)):
        with pytest.raises(NoSuchSite, match="no span"):
            gates.at("gated", span=wrong)
    with pytest.raises(NoSuchSite, match="no span 'picture'"):
        al.Knockout(gates, source="picture", target="last")


def test_what_is_no_input_is_told() -> None:
    """Errors: `where` together with points, and a metric that does not depend on the logits."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual")
    with pytest.raises(LensError, match="where= applies to sites only"):
        lens.record(points, batch, where="last")
    with pytest.raises(LensError, match="does not depend on the logits"):
        lens.record(points, batch, metric=lambda logits: torch.zeros(2))


def test_what_cuts_nothing_is_told() -> None:
    """A knockout that finds no positions warns; a block without a forward pass does not."""
    lens, batch = al.Lens(base("llava")), BY_NAME["llava"].batch()
    text = {"input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"]}
    text["input_ids"][BY_NAME["llava"].span(batch, "image")] = 7
    attention = language(lens, "o_proj")
    with (
        pytest.warns(Remark, match="matched no position"),
        lens.intervene(al.Knockout(attention, source="image", target="last")),
    ):
        lens.run(text)
    over = lens.record(attention.at("output"), batch, keep="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lens.intervene(al.Zero(attention.at("heads")), al.Mean(attention.at("output"), over=over)):
            pass


def test_the_factors_of_a_second_model_are_part_of_it(tmp_path: Any) -> None:
    """Hooks around `pair.tuned()` see the adapted output; entered twice, the factors apply once."""
    from tests.lens.test_paired import adapted

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = adapted(BY_NAME["llama"].build(), ["gate_proj", "q_proj"])
        wrapped.save_pretrained(tmp_path)
        expected = logits(wrapped, BY_NAME["llama"].batch())
    model, batch = BY_NAME["llama"].build(), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    gates, pair = language(lens, "gate_proj"), lens.paired(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lens.record(gates.at("output")) as recording, pair.tuned():
            with pair.tuned():
                assert torch.equal(expected, logits(model, batch))
            assert torch.equal(expected, logits(model, batch))
        with lens.intervene(al.Zero(gates.at("output"))), pair.tuned():
            zeroed = logits(model, batch)
        with pair.tuned(), lens.intervene(al.Zero(gates.at("output"))):
            assert torch.equal(zeroed, logits(model, batch))
    with al.Lens(wrapped).record(al.Lens(wrapped).sites.where(role="gate_proj").at("output")) as theirs:
        logits(wrapped, batch)
    ours, other = (r[r.points[0]].values[:2] for r in (recording, theirs))
    torch.testing.assert_close(other, ours)


def test_a_mask_that_means_the_opposite_is_refused() -> None:
    """A knockout in MPT, whose mask has true for hidden keys, is an error."""
    lens = al.Lens(of_type("mpt"))
    ids = torch.arange(3, 11).reshape(1, -1)
    with (
        lens.intervene(al.Knockout(lens.sites.where(role="o_proj"), source=0, target="last")),
        pytest.raises(LensError, match="uses true for hidden keys in its mask"),
    ):
        lens.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_a_loop_by_hand_is_followed_step_by_step() -> None:
    """A generation loop by hand, with a cache, has the same positions as `generate`."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual", span="generated")
    with lens.record(points) as expected:
        ids = lens.model.generate(**batch, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    with lens.record(points) as found, torch.no_grad():
        given, cache = dict(batch), None
        for step in range(4):
            out = lens.model(**given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            given["input_ids"] = out.logits[:, -1:].argmax(-1)
            assert torch.equal(ids[:, batch["input_ids"].shape[1] + step], given["input_ids"][:, 0])
            given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)

    for point in points:
        assert (2, 3) == found[point].values.shape[:2]
        torch.testing.assert_close(expected[point].values, found[point].values)


def test_layers_that_run_on_the_last_position_alone_have_it() -> None:
    """Gemma 4's upper layers run on one position, which is the last of the prompt."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds}
    torch.manual_seed(0)
    config = Gemma4TextConfig(**{**_AT_BIRTH["gemma4_text"], **shared})
    lens = al.Lens(Gemma4ForCausalLM(config).eval())
    ids = torch.arange(3, 11).reshape(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    points = lens.sites.where(role="down_proj").at("residual", span="last")
    plain = lens.run(batch)
    with lens.intervene(al.Patch(points, source=lens.record(points, batch))):
        assert torch.equal(plain, lens.run(batch))
    with lens.intervene(al.Zero(points[-1:])):
        assert differ(plain, lens.run(batch))
    for site in lens.sites.where(role="o_proj"):
        with lens.intervene(al.Knockout(site, source=0, target="last")):
            assert differ(plain, lens.run(batch))


def test_a_prompts_recording_is_patched_under_labels_of_several_tokens() -> None:
    """A recording of the prompt is patched into the prompt alone; the answer keeps its own activations."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = language(lens, "down_proj").at("residual")
    plain = logp_of(lens, batch, (7, 9, 4))
    with lens.intervene(al.Patch(points, source=lens.record(points, batch))):
        found = logp_of(lens, batch, (7, 9, 4))

    torch.testing.assert_close(plain, found)


def test_a_door_is_to_the_part_that_answers() -> None:
    """Both doors refuse a whole omni model, and name the part to open."""
    from tests.lens.test_running import omni

    lens = al.Lens(omni())
    for door in (lens.nnsight, lens.bridge):
        with pytest.raises(LensError, match=r"al\.Lens\(lens\.model\.thinker"):
            door()


WHERE = """
import warnings
import affectlens as al
from tests.lens.families import BY_NAME, base
lens, batch = al.Lens(base("llava")), BY_NAME["llava"].batch()
batch["input_ids"][BY_NAME["llava"].span(batch, "image")] = 7
del batch["pixel_values"]
sites = lens.sites.where(tower="language", role="down_proj")
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    with lens.intervene(al.Zero(sites.at("residual", span="image"))):  # line 11
        lens.run(batch)
    with lens.intervene(al.Zero(sites)):  # line 13
        pass
for one in found:
    print(one.filename, one.lineno, one.message)
"""


def test_a_remark_is_made_where_the_block_stands(tmp_path: Any) -> None:
    """A remark has the line of the `with`, one for all idle points; in a process without shape checks."""
    (tmp_path / "block.py").write_text(WHERE)
    command = [sys.executable, str(tmp_path / "block.py")]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}
    )
    lines = [line.split("block.py ")[1] for line in run.stdout.splitlines()]

    assert 2 == len(lines)
    assert lines[0].startswith("11 ")
    assert "and 1 more points matched no position in 1 forward passes" in lines[0]
    assert lines[1].startswith("13 Zeroing down_proj deletes the MLP")
