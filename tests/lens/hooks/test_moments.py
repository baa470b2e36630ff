"""Which position is meant: in drafts, states, conversations, beams, and passes below the head."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError
from affectlens.sites import Points, Span
from tests.lens.families import BY_NAME, Batch, base, lens_of
from tests.tiny_models import tiny

SPANS: tuple[Span, ...] = ("last", "generated", "prompt", -1, 0, (1, 2))
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
STATEFUL = ("mamba", "falcon_mamba", "rwkv", "qwen3_next", "falcon_h1")
IDS = torch.tensor([[11, 12, 13, 11, 12, 13, 11, 12]])


def text(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def point(model: nn.Module, span: Span) -> Points:
    language = lens_of(model).sites.where(tower="language", layer=0)
    return language[:1].at("residual", span=span).expect(1)


def said(model: nn.Module, span: Span, batch: Batch, **settings: Any) -> Tensor:
    with lens_of(model).intervene(al.Scale(point(model, span), factor=-3.0)):
        found: Tensor = model.generate(**batch, **{**SETTINGS, **settings})  # type: ignore[operator]
    return found


def recorded(model: nn.Module, span: Span, run: Callable[[], object]) -> Tensor:
    """Return what passes a point in a run, one row per position."""
    points = point(model, span)
    with lens_of(model).record(points) as found:
        run()
    passed = found[points[0]]
    assert isinstance(passed, al.lens.Activations)
    return passed.rows


def step_by_step(model: nn.Module, span: Span, batch: Batch, *, steps: int) -> Tensor:
    """Return what greedy steps without a cache write, where plain hooks change the span's positions."""
    ids, count = batch["input_ids"], batch["input_ids"].shape[1]
    points = point(model, None)
    module = model.get_submodule(lens_of(model).record(points)._places[points[0]].module)
    for _ in range(steps):
        now = ids.shape[1]
        positions = {
            "last": [count - 1],
            "generated": list(range(count, now)),
            "prompt": list(range(count)),
            -1: [count - 1],
            0: [0],
            (1, 2): [1, 2],
        }[span]  # type: ignore[index]

        def changed(module: nn.Module, args: Any, out: Any, positions: list[int] = positions) -> Any:
            first = (out[0] if isinstance(out, tuple) else out).clone()
            first[:, positions] *= -3.0
            return (first, *out[1:]) if isinstance(out, tuple) else first

        handle = module.register_forward_hook(changed)
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_drafts_of_an_assistant_are_no_prompt(count: int, span: Span) -> None:
    """Assisted decoding and prompt lookup write what plain decoding writes, whatever span is changed."""
    model, draft = base("llama"), BY_NAME["llama"].build()
    settings = {"max_new_tokens": count, "min_new_tokens": count}
    assistant = {"assistant_model": draft, "num_assistant_tokens_schedule": "constant"}
    expected = said(model, span, text(IDS), **settings)

    assert torch.equal(
        expected, said(model, span, text(IDS), **settings, **assistant, num_assistant_tokens=4)
    )
    assert torch.equal(expected, said(model, span, text(IDS), **settings, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("span", ["generated", None])
def test_drafts_are_not_recorded(span: Span) -> None:
    """A recording would keep rejected drafts: of positions that may hold some it is an error."""
    model = base("llama")

    def run() -> None:
        model.generate(**text(IDS), **SETTINGS, prompt_lookup_num_tokens=3)  # type: ignore[operator]

    with pytest.raises(LensError, match="drafts"):
        recorded(model, span, run)
    assert 1 == len(recorded(model, "last", run))
    assert 8 == len(recorded(model, "prompt", run))


@pytest.mark.parametrize("span", SPANS)
def test_a_model_that_drafts_for_itself_is_changed_in_its_answer(span: Span) -> None:
    """With an early exit, the same layers compute drafts too, which change no answer."""
    model = BY_NAME["llama"].build()
    expected = said(model, span, text(IDS))

    assert torch.equal(expected, said(model, span, text(IDS), assistant_early_exit=1))
    assert 1 == len(
        recorded(model, "last", lambda: model.generate(**text(IDS), **SETTINGS, assistant_early_exit=1))  # type: ignore[operator]
    )


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("model_type", [*STATEFUL, "recurrent_gemma"])
def test_a_state_is_as_good_as_a_cache(model_type: str, span: Span) -> None:
    """A recurrent model generates step by step what whole passes with plain hooks write."""
    model = tiny(model_type)

    assert torch.equal(step_by_step(model, span, text(IDS), steps=4), said(model, span, text(IDS)))


@pytest.mark.parametrize("model_type", STATEFUL)
def test_steps_by_hand_continue_their_state(model_type: str) -> None:
    """A loop of forward passes over its own cache or state generates; the prompt has one last token."""
    model = tiny(model_type)

    def run() -> None:
        with torch.no_grad():
            out = model(input_ids=IDS, use_cache=True)
            for _ in range(3):
                names = ("past_key_values", "cache_params", "state")
                cache = {name: out[name] for name in names if out.get(name) is not None}
                out = model(input_ids=out.logits[:, -1:].argmax(-1), use_cache=True, **cache)

    assert [1, 3, 8] == [len(recorded(model, span, run)) for span in ("last", "generated", "prompt")]


def test_a_state_from_before_the_block_is_refused() -> None:
    """A state does not say how many tokens it has read, so a span behind an unknown one is an error."""
    model = tiny("mamba")
    with torch.no_grad():
        state = model(input_ids=IDS, use_cache=True).cache_params
        with pytest.raises(LensError, match="state"):
            recorded(model, "last", lambda: model(input_ids=IDS[:, :1], cache_params=state, use_cache=True))


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl", "gemma3", "gpt2", "mixtral"])
def test_a_pass_below_the_head_has_positions_of_its_own(name: str) -> None:
    """Where a part is called by itself, its own tokens and padding count, not those of the last pass."""
    model, batch = base(name), BY_NAME[name].batch()
    turned = {
        k: t.flip(0) if k in ("input_ids", "attention_mask", "position_ids") else t for k, t in batch.items()
    }
    below = model.base_model

    def rows(run: Callable[[], object], span: Span) -> Tensor:
        with torch.no_grad():
            return recorded(model, span, run)

    for span in (*SPANS, None):
        expected = rows(lambda: model(**turned, use_cache=False), span)
        alone = rows(lambda: below(**turned, use_cache=False), span)  # type: ignore[operator]
        assert torch.equal(expected, alone)
        both = rows(lambda: (model(**batch, use_cache=False), below(**turned, use_cache=False)), span)  # type: ignore[operator]
        assert torch.equal(expected, both[len(both) - len(expected) :])


def test_a_language_model_that_is_given_embeddings_knows_its_padding() -> None:
    """Embeddings and a mask are enough for numbers; the media in them are unknown."""
    model, batch = base("llava"), BY_NAME["llava"].batch()
    embedded = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    mask = batch["attention_mask"]

    def run() -> None:
        with torch.no_grad():
            model.model.language_model(inputs_embeds=embedded, attention_mask=mask)  # type: ignore[operator, union-attr]

    assert int(mask.sum()) == len(recorded(model, None, run))
    assert 2 == len(recorded(model, 0, run))
    with pytest.raises(LensError, match="embeddings"):
        recorded(model, "image", run)


def test_a_layer_by_itself_has_no_positions() -> None:
    """A layer that is called outside any pass is not given the positions of the last pass."""
    model = base("llama")
    layers = model.model.layers  # type: ignore[union-attr]
    states = torch.randn(1, 8, 64)
    rotary = model.model.rotary_emb(states, torch.arange(8)[None])  # type: ignore[operator, union-attr]

    def run() -> None:
        with torch.no_grad():
            model(**text(IDS))
            layers[0](states, position_embeddings=rotary)  # type: ignore[index]

    with pytest.raises(LensError, match="no token positions"):
        recorded(model, "last", run)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral", "gemma3", "qwen2_vl"])
def test_a_conversation_goes_on_where_generate_was_called(name: str) -> None:
    """In a second turn on the cache of the first, `generated` begins where the second call began."""
    model = base(name)
    settings = {**SETTINGS, "return_dict_in_generate": True}
    first = model.generate(**text(IDS), **settings)  # type: ignore[operator]
    longer = text(torch.cat([first.sequences, torch.tensor([[21, 22, 23]])], dim=1))

    def turn(batch: Batch) -> None:
        model.generate(**batch, past_key_values=copy.deepcopy(first.past_key_values), **settings)  # type: ignore[operator]

    def both() -> None:
        out = model.generate(**text(IDS), **settings)  # type: ignore[operator]
        model.generate(**longer, past_key_values=out.past_key_values, **settings)  # type: ignore[operator]

    cached = first.past_key_values.get_seq_length()
    counts: dict[Span, int] = {"last": 1, "generated": 3, "text": 15 - cached, -1: 1, 0: 0, None: 18 - cached}
    for span, count in counts.items():
        assert count == len(recorded(model, span, lambda: turn(longer))), span
    assert [2, 6] == [len(recorded(model, span, both)) for span in ("last", "generated")]
    new = {**longer, "input_ids": longer["input_ids"][:, cached:]}
    assert [1, 3] == [len(recorded(model, span, lambda: turn(new))) for span in ("last", "generated")]
    with pytest.raises(LensError, match="cache"):
        recorded(model, "text", lambda: turn(new))


def test_a_shared_beginning_is_not_continued_by_its_copies() -> None:
    """Questions behind copies of one cache are inputs of their own, also those of a single token."""
    model = base("llama")

    def run() -> None:
        with torch.no_grad():
            cache = model(input_ids=IDS, use_cache=True).past_key_values
            for question in ([31], [32], [33, 34]):
                model(input_ids=torch.tensor([question]), past_key_values=copy.deepcopy(cache))

    assert [4, 0, 12] == [len(recorded(model, span, run)) for span in ("last", "generated", None)]


def test_several_tokens_behind_a_cache_are_refused_by_hand() -> None:
    """Whether they are the next turn or an answer, nothing says."""
    model = base("llama")

    def run() -> None:
        with torch.no_grad():
            cache = model(input_ids=IDS, use_cache=True).past_key_values
            model(input_ids=IDS[:, :2], past_key_values=cache)

    with pytest.raises(LensError, match="unclear"):
        recorded(model, "generated", run)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "t5gemma"])
@pytest.mark.parametrize("span", ["last", "prompt", "text", 0, -2, None])
def test_beams_of_an_encoder_decoder_read_the_same_encoder(name: str, span: Span) -> None:
    """In cross-attention, each beam has the positions of its own example's encoder."""
    model, batch = base(name), BY_NAME[name].batch()
    batch.pop("decoder_input_ids")
    lens = lens_of(model)
    keys = lens.sites.where(tower="language", stack="decoder", role="k_proj", layer=0)
    points = Points(point for point in keys.at("output", span=span) if _across(point)).expect(1)
    found = []
    for beams in (1, 3):
        with lens.record(points) as recording:
            model.generate(**batch, **SETTINGS, num_beams=beams)  # type: ignore[operator]
        found.append(recording[points[0]])
    alone, wide = found
    example = torch.arange(2).repeat_interleave(3)

    assert torch.equal(alone.chosen[example], wide.chosen)
    assert torch.equal(alone.values[example], wide.values)


def _across(point: Any) -> bool:
    return "cross" in point.site.label.lower() or "encdec" in point.site.label.lower()


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "qwen3_next"])
def test_a_model_that_runs_beside_another_has_a_state_of_its_own(model_type: str) -> None:
    """A patch of everything from another model makes the first generate what the other generates."""
    model, other = tiny(model_type), tiny(model_type)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(1.5 if re.search(r"\.\d+\.", name) else 1)  # of the layers
    sites = al.Lens(model).sites.where(tower="language")
    last = max(site.layer for site in sites if site.layer is not None)
    end = sites.where(layer=last)[:1].at("residual")
    expected = other.generate(**text(IDS), **SETTINGS)
    before = model.generate(**text(IDS), **SETTINGS)
    with al.Lens(model).intervene(al.Patch(end, source=al.Lens(other))):
        found = model.generate(**text(IDS), **SETTINGS)

    assert torch.equal(expected, found)
    assert not torch.equal(expected, before)
    assert torch.equal(before, model.generate(**text(IDS), **SETTINGS))


def test_another_model_follows_no_part_and_no_fixed_cache() -> None:
    """Where the other model can't run on the same input, a patch from it is an error."""
    model, other = base("llama"), BY_NAME["llama"].build(seed=1)
    with lens_of(model).intervene(al.Patch(point(model, None), source=al.Lens(other))):
        with pytest.raises(LensError, match="whole"):
            model.base_model(**text(IDS))
        with pytest.raises(LensError, match="dynamic"):
            model.generate(**text(IDS), **SETTINGS, cache_implementation="static", disable_compile=True)


def test_blocks_that_end_in_any_order_give_the_model_its_methods_back() -> None:
    """While blocks are open the model's own methods are hidden; the last one out shows them again."""
    model = BY_NAME["llama"].build()
    before = dict(vars(model))
    lens = al.Lens(model)
    one, two = (lens.record(point(model, "last")) for _ in range(2))
    one.__enter__()
    two.__enter__()
    hidden = set(vars(model)) - set(before)
    one.__exit__(None, None, None)
    model.generate(**text(IDS), **SETTINGS, prompt_lookup_num_tokens=3)  # type: ignore[operator]
    two.__exit__(None, None, None)

    assert "prepare_inputs_for_generation" in hidden
    assert before == vars(model)
    assert 1 == len(two[two.points[0]].rows)  # type: ignore[union-attr]


def test_a_copy_in_a_block_is_refused_and_one_behind_it_generates_by_itself() -> None:
    """A copy would keep the hidden methods of `generate`; behind the block nothing of them is left."""
    model = BY_NAME["llama"].build()
    expected = model.generate(**text(IDS), **SETTINGS)  # type: ignore[operator]
    with al.Lens(model).record(point(model, "last")), pytest.raises(LensError, match="inside a block"):
        copy.deepcopy(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert torch.equal(expected, copied.generate(**text(IDS), **SETTINGS))  # type: ignore[operator]


def test_a_mask_that_hides_the_padding_is_no_recording() -> None:
    """Where a mask does not say which tokens are padding, a recording would count them."""
    model = base("llama")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    for span in (None, "last"):
        with pytest.raises(LensError, match="mask"):
            recorded(model, span, lambda: model(input_ids=IDS, attention_mask=mask))
