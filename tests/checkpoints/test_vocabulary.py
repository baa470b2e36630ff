"""Embeddings whose tokens are in another order are compared row by row of the same token."""

import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
from torch import Tensor

import affectlens as al
from affectlens.checkpoints.tokenizer_files import open_tokenizer
from affectlens.errors import NothingToCompare
from tests.small_models import tiny

SIZE = tiny("llama").config.vocab_size  # type: ignore[union-attr, operator]
TOKENS = [f"w{number}" for number in range(SIZE - 4)]  # four rows pad the matrix
NAMES = ("model.embed_tokens.weight", "lm_head.weight")
WEIGHTS = {name: tensor.detach().clone() for name, tensor in tiny("llama").named_parameters()}


def bpe(folder: Path, tokens: list[str], **parts: Any) -> None:
    vocab = {token: number for number, token in enumerate(tokens)}
    special = [{"id": 0, "content": tokens[0], "special": True}]
    found = {
        "model": {"type": "BPE", "vocab": vocab, "merges": [["w", "1"]]},
        "added_tokens": special,
        **parts,
    }
    (folder / "tokenizer.json").write_text(json.dumps(found))


def unigram(folder: Path, tokens: list[str]) -> None:
    pieces = [[token, -1.0] for token in tokens]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": pieces}}))


def slow(folder: Path, tokens: list[str]) -> None:
    numbers = {token: number for number, token in enumerate(tokens)}
    last = {token: numbers.pop(token) for token in tokens[-2:]}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "added_tokens.json").write_text(json.dumps(last))


def wordpiece(folder: Path, tokens: list[str]) -> None:
    (folder / "vocab.txt").write_text("\n".join(tokens))


def whole(folder: Path, tokens: list[str]) -> None:
    """Write a tokenizer that transformers loads."""
    numbers = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.WordLevel(numbers, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0").save_pretrained(folder)


Write = Callable[[Path, list[str]], None]
FORMS: dict[str, Write] = {"BPE": bpe, "Unigram": unigram, "slow": slow, "WordPiece": wordpiece}


def folder_of(path: Path, weights: Mapping[str, Tensor], tokens: list[str], *, write: Write = bpe) -> Path:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    config = {**tiny("llama").config.to_dict(), "vocab_size": weights[NAMES[0]].shape[0]}  # type: ignore[union-attr, operator]
    (path / "config.json").write_text(json.dumps(config, default=str))
    write(path, tokens)
    return path


def reordered(order: list[int], *, step: float = 0.0) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights with rows in another order, each moved by `step`, and their tokens."""
    rows = torch.tensor(order)
    moved = {name: WEIGHTS[name][rows] + step for name in NAMES}
    return {**WEIGHTS, **moved}, [TOKENS[number] for number in order if number < len(TOKENS)]


PADDING = [SIZE - 4, SIZE - 3, SIZE - 2, SIZE - 1]
BACK = [*reversed(range(len(TOKENS))), *PADDING]
# what of the vocabulary tuned has → rows that are compared
ORDERS: dict[str, tuple[list[int], int]] = {
    "turned": (BACK, SIZE),
    "two swapped": ([1, 0, *range(2, SIZE)], SIZE),
    "cut at the start": (list(range(10, len(TOKENS))), len(TOKENS) - 10),
    "cut inside": ([*range(5), *range(20, len(TOKENS))], len(TOKENS) - 15),
    "cut and turned": ([*reversed(range(10, len(TOKENS)))], len(TOKENS) - 10),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ORDERS)
def test_rows_are_those_of_the_same_token(case: str, form: str, tmp_path: Path) -> None:
    """Whichever side has them in which order, a token's row moved by what was added to it."""
    order, count = ORDERS[case]
    weights, tokens = reordered(order, step=0.5)
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS, write=FORMS[form])
    tuned = folder_of(tmp_path / "tuned", weights, tokens, write=FORMS[form])
    width = WEIGHTS[NAMES[0]].shape[1]

    for one, two in ((base, tuned), (tuned, base)):
        drift = al.diff(one, two, spectra=1, progress=False)

        rows = drift.frame[drift.frame["parameter"].isin(NAMES)]
        assert [count * width] * 2 == rows["size"].tolist()
        assert pytest.approx([0.5, 0.5], rel=1e-5) == rows["rms"].tolist()
        assert pytest.approx([0.5, 0.5], rel=1e-5) == rows["max_abs"].tolist()
        assert pytest.approx(rows["frobenius"].tolist(), rel=1e-4) == rows["spectral_norm"].tolist()
        assert 2 == drift.ledger.set_index("state").loc["matched", "sites"]
        assert "Rows of the embeddings were matched by token." in drift.findings
        assert any("have another number" in finding for finding in drift.findings)
        assert al.open_checkpoint(one).parameters == drift.ledger["base_parameters"].sum()
        assert al.open_checkpoint(two).parameters == drift.ledger["tuned_parameters"].sum()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_line_of_a_vocabulary_is_a_token(end: str, tmp_path: Path) -> None:
    """Line ends other than the file's are part of a token, as transformers reads it."""
    tokens = ["[PAD]", "a", "\u2028", "b\x85", "c"]
    (tmp_path / "vocab.txt").write_text("".join(token + end for token in tokens), "utf-8", newline="")
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    found = open_tokenizer(al.open_checkpoint(tmp_path).store)

    assert found is not None
    assert found.tokens == {token: number for number, token in enumerate(tokens)}


def test_the_same_model_in_another_order_did_not_move(tmp_path: Path) -> None:
    """Norms and the ledger say so."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    tuned = folder_of(tmp_path / "tuned", *reordered(BACK))

    drift = al.diff(base, tuned, progress=False)

    assert 0.0 == drift.frame["frobenius"].max()
    assert "The language model did not move at all: its drift is exactly zero." == drift.findings[0]


def test_workers_match_rows_too(tmp_path: Path) -> None:
    """A job names sites, and finds their rows again."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    tuned = folder_of(tmp_path / "tuned", *reordered(BACK, step=0.5))
    expected = al.diff(base, tuned, progress=False).frame

    with ThreadPoolExecutor(1) as pool:
        found = al.diff(base, tuned, executor=pool, progress=False).frame

    assert expected["frobenius"].tolist() == found["frobenius"].tolist()


@pytest.mark.parametrize("order", ["as base", "as tuned"])
def test_a_control_is_compared_if_its_rows_are_those_of_base(order: str, tmp_path: Path) -> None:
    """Rows of other tokens would be no control."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    tuned = folder_of(tmp_path / "tuned", *reordered(BACK, step=0.5))
    mine = list(range(SIZE)) if order == "as base" else BACK
    control = folder_of(tmp_path / "control", *reordered(mine, step=0.25))

    for two in (tuned, folder_of(tmp_path / "plain", *reordered(list(range(SIZE)), step=0.5))):
        frame = al.diff(base, two, control=control, progress=False).frame
        rows = frame[frame["parameter"].isin(NAMES)]

        if order == "as base":
            assert pytest.approx([0.25, 0.25], rel=1e-5) == rows["control_rms"].tolist()
            assert pytest.approx([1.0, 1.0], rel=1e-5) == rows["control_cosine"].tolist()
        else:
            assert rows["control_frobenius"].isna().all()
        assert frame[~frame["parameter"].isin(NAMES)]["control_frobenius"].notna().all()


def test_new_tokens_at_the_end_leave_the_rows_in_place(tmp_path: Path) -> None:
    """They are a resized vocabulary, with a finding on the tokens."""
    more = {**WEIGHTS, **{name: torch.cat([WEIGHTS[name], torch.ones(6, 32)]) for name in NAMES}}
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    tuned = folder_of(tmp_path / "tuned", more, [*TOKENS, "<affect>"])

    drift = al.diff(base, tuned, progress=False)

    assert 2 == drift.ledger.set_index("state").loc["resized", "sites"]
    assert 0.0 == drift.frame["frobenius"].max()
    assert any(
        "0 tokens are in base alone, 1 in tuned alone (first: '<affect>')" in f for f in drift.findings
    )


CHATML, SMOL = "{{ messages }}", "{{ messages[0].content }}"


def jinja(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def in_config(folder: Path, text: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))


def named(folder: Path, text: str) -> None:
    listed = [{"name": "default", "template": text}, {"name": "tool_use", "template": text}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))


def of_processor(folder: Path, text: str) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))


@pytest.mark.parametrize("tuned_form", [jinja, in_config, named, of_processor])
@pytest.mark.parametrize("base_form", [jinja, in_config, named, of_processor])
def test_chat_templates_are_compared_wherever_they_are_stored(
    base_form: Callable[[Path, str], None], tuned_form: Callable[[Path, str], None], tmp_path: Path
) -> None:
    """Two that differ are a finding, equal ones in two forms are none."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    base_form(base, CHATML)
    for name, text in (("same", CHATML), ("other", SMOL)):
        tuned = folder_of(tmp_path / name, WEIGHTS, TOKENS)
        tuned_form(tuned, text)

        findings = al.diff(base, tuned, progress=False).findings

        assert any("chat templates" in finding for finding in findings) == (name == "other")


def test_a_template_on_one_side_alone_is_a_finding(tmp_path: Path) -> None:
    """Without tokenizer files a side uses those of base, and nothing is said."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    tuned = folder_of(tmp_path / "tuned", WEIGHTS, TOKENS)
    jinja(tuned, SMOL)

    assert any("tuned has one, base has none" in f for f in al.diff(base, tuned, progress=False).findings)
    (tuned / "tokenizer.json").unlink()
    assert not any("template" in finding for finding in al.diff(base, tuned, progress=False).findings)


def test_what_makes_other_tokens_of_a_text_is_a_finding(tmp_path: Path) -> None:
    """The same vocabulary, but another normalizer or post-processor; how merges are written says nothing."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    tuned = folder_of(tmp_path / "tuned", WEIGHTS, TOKENS)
    vocab = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    bpe(tuned, TOKENS, model={"type": "BPE", "vocab": vocab, "merges": ["w 1"]})
    assert not any("tokenizers" in finding for finding in al.diff(base, tuned, progress=False).findings)

    bpe(tuned, TOKENS, post_processor={"type": "TemplateProcessing"}, normalizer={"type": "NFC"})
    findings = al.diff(base, tuned, progress=False).findings

    assert any("The tokenizers differ in normalizer, post_processor" in finding for finding in findings)


def test_binary_vocabularies_are_compared_by_their_bytes(tmp_path: Path) -> None:
    """Their tokens are not read, so rows stay in place."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS, write=lambda f, _: (f / "tokenizer.model").touch())
    tuned = folder_of(tmp_path / "tuned", WEIGHTS, TOKENS, write=lambda f, _: (f / "tokenizer.model").touch())
    assert not any("tokenizers" in finding for finding in al.diff(base, tuned, progress=False).findings)

    (tuned / "tokenizer.model").write_bytes(b"other")

    findings = al.diff(base, tuned, progress=False).findings
    assert any("can't be compared token by token" in finding for finding in findings)


BROKEN: dict[str, bytes] = {
    "no JSON": b"{",
    "a list": b"[]",
    "a vocabulary of a list of numbers": b'{"model": {"vocab": [1, 2]}}',
    "a vocabulary of texts": b'{"model": {"vocab": {"a": "b", "c": -1, "d": true}}}',
    "merges of numbers": b'{"model": {"vocab": {"a": 0}, "merges": [1]}}',
    "a number far away": b'{"model": {"vocab": {"w0": 1000000000000}}}',
    "a model that is none": b'{"model": 3, "added_tokens": 4}',
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_breaks_no_diff(case: str, tmp_path: Path) -> None:
    """Its weights are compared all the same."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS)
    tuned = folder_of(tmp_path / "tuned", WEIGHTS, TOKENS)
    (tuned / "tokenizer.json").write_bytes(BROKEN[case])

    drift = al.diff(base, tuned, progress=False)

    assert not drift.frame["frobenius"].any()
    assert len(drift.findings) >= 2


def test_a_transplant_copies_the_rows_of_the_same_tokens(tmp_path: Path) -> None:
    """All weights of the same model in another order of tokens change nothing; half of a change is half."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS, write=whole)
    same, moved = (
        folder_of(tmp_path / f"moved by {step}", *reordered(BACK, step=step), write=whole)
        for step in (0.0, 1.0)
    )
    lens = al.load(base)
    ids = torch.tensor([[1, 5, 9, 30]])
    before = lens.run({"input_ids": ids})

    change = al.Transplant(lens.sites, donor=same)
    with warnings.catch_warnings(record=True, action="always") as told, lens.intervene(change):
        assert torch.equal(before, lens.run({"input_ids": ids}))
    assert any("common tokens have another number" in str(one.message) for one in told)
    for alpha in (1.0, 0.5):
        words = lens.sites.where(role="embed_tokens")
        with lens.intervene(al.Transplant(words, donor=moved, alpha=alpha)):
            found = lens.parameters[NAMES[0]]
            assert torch.allclose(found[: len(TOKENS)], WEIGHTS[NAMES[0]][: len(TOKENS)] + alpha)
    assert torch.equal(before, lens.run({"input_ids": ids}))


def test_a_sweep_knows_that_nothing_but_the_order_changed(tmp_path: Path) -> None:
    """A donor whose tokens are in another order, and whose rows are the same, has nothing to transplant."""
    base = folder_of(tmp_path / "base", WEIGHTS, TOKENS, write=whole)
    same = folder_of(tmp_path / "same", *reordered(BACK), write=whole)
    lens = al.load(base)
    task = al.Task("t", (al.Example("1", "w1", text="w2"), al.Example("2", "w3", text="w4")), ("w1", "w3"))

    with pytest.raises(NothingToCompare, match="equals the base in every weight"):
        al.sweep(lens, al.Grid(lens.sites, donor=same), task, progress=False)
