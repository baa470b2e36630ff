"""Evaluating: constrained scores are label probabilities, greedy ones are read from written answers."""

from dataclasses import replace

import pytest
import torch

import affectlens as al
from affectlens.effects.evaluating import label_logps, prepare_task
from affectlens.errors import LensError, TaskError


@pytest.fixture(scope="module")
def task(demo: al.Demo) -> al.Task:
    return demo.task("faces-unseen").head(24)


def test_constrained_scores_are_log_probabilities(lens: al.Lens, task: al.Task) -> None:
    """logp and margin equal those computed by hand from the logits, one example at a time."""
    scores = al.evaluate(lens, task)
    ids = [lens.tokenizer.encode(label, add_special_tokens=False)[0] for label in task.labels]

    for row, example in zip(scores.frame.itertuples(), task.examples[:5], strict=False):
        logps = lens.logits(example, prompt=task.prompt)[0].log_softmax(-1)[ids]
        gold = task.labels.index(example.label)
        others = torch.cat([logps[:gold], logps[gold + 1 :]])
        assert pytest.approx(float(logps[gold]), abs=1e-4) == row.logp
        assert pytest.approx(float(logps[gold] - others.max()), abs=1e-4) == row.margin
        assert task.labels[int(logps.argmax())] == row.prediction


def test_labels_of_several_tokens_get_the_probability_of_all(lens: al.Lens, task: al.Task) -> None:
    """log p(ab) = log p(a) + log p(b | a), with the label's tokens run after the prompt."""
    prepared = prepare_task(lens, task)
    first, second = prepared.labels[0][0], prepared.labels[1][0]
    batch = prepared.batches[0]
    longer = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((24, 1), first)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(24, 1, dtype=torch.long)], dim=1),
        "pixel_values": batch["pixel_values"],
    }
    expected = (
        lens.run(batch)[:, -1].log_softmax(-1)[:, first] + lens.run(longer)[:, -1].log_softmax(-1)[:, second]
    )
    whole = prepared.choices[0]
    doubled = replace(whole, labels=tuple(((first, second), *row[1:]) for row in whole.labels))
    double = replace(prepared, choices=(doubled,))

    torch.testing.assert_close(expected, label_logps(lens, double)[:, 0], atol=1e-4, rtol=1e-4)


def test_the_size_of_a_batch_changes_no_answer(lens: al.Lens, task: al.Task) -> None:
    """Margins are the same in batches of 5 and of 24."""
    one, two = (al.evaluate(lens, task, batch_size=size).values("margin") for size in (5, 24))

    assert pytest.approx(one, abs=1e-4) == two


def test_tied_labels_share_an_answer(demo: al.Demo, task: al.Task) -> None:
    """With equal rows of the output matrix, all labels tie, and accuracy is 1/k whatever their order."""
    lens = al.load(demo.base, dtype="float32")
    tied = lens.sites.where(tower="language", role="embed_tokens")  # the output matrix too
    head = lens.parameter(tied.expect(1)[0])
    with torch.no_grad():
        head.copy_(head[:1].clone().expand_as(head))
    scores = al.evaluate(lens, task)

    assert [1 / len(task.labels)] * len(task) == scores.values("accuracy").tolist()
    assert [0.0] * len(task) == scores.values("margin").tolist()
    assert {task.labels[0]} == set(scores.frame["prediction"])


def test_greedy_answers_are_words_read_strictly(lens: al.Lens, task: al.Task) -> None:
    """Each example keeps the written text; there is no margin."""
    scores = al.evaluate(lens, task, answer="greedy")

    assert len(task) == len(scores.frame["text"])
    assert ("accuracy",) == scores.metrics
    with pytest.raises(TaskError, match="unknown answer='sampling'"):
        al.evaluate(lens, task, answer="sampling")


def test_greedy_and_constrained_answers_of_a_trained_model_agree(demo: al.Demo) -> None:
    """On faces it was trained on, the tuned model's first word is the label that it scores highest."""
    tuned, faces = al.load(demo.tuned, dtype="float32"), demo.task("faces-fit").head(24)
    said = al.evaluate(tuned, faces, answer="greedy", max_new_tokens=1).frame["prediction"]
    scored = al.evaluate(tuned, faces).frame["prediction"]

    assert list(scored) == list(said)
    assert 0.9 <= al.evaluate(tuned, faces).metric().value


def test_scores_say_what_they_are(lens: al.Lens, demo: al.Demo) -> None:
    """The summary calls fit by its name and gives every metric an interval."""
    summary = al.evaluate(lens, demo.task("faces-fit").head(8)).summary

    assert "fit, not skill" in summary
    assert "[" in summary


def test_labels_that_a_tokenizer_can_not_tell_apart_are_refused(lens: al.Lens, task: al.Task) -> None:
    """Two labels with the same tokens are an error."""
    one = task.examples[0]
    examples = (al.Example("1", "happy", images=one.images), al.Example("2", "HAPPY", images=one.images))

    with pytest.raises(TaskError, match="the tokens of label 'happy' are the beginning of those of 'HAPPY'"):
        al.evaluate(lens, al.Task("t", examples, ("happy", "HAPPY"), prompt="feel"))


def test_a_label_that_begins_another_is_refused(lens: al.Lens, task: al.Task) -> None:
    """Its probability is never below the longer one's, so it would win every time."""
    from affectlens.effects.evaluating import _check_labels

    with pytest.raises(TaskError, match="the tokens of label 'happy' are the beginning of those of 'sad'"):
        _check_labels(task, ((1,), (1, 2), *(((9 + i),) for i in range(7))))


def test_nan_logits_are_an_error_and_no_answer(demo: al.Demo, task: al.Task) -> None:
    """Otherwise a broken model would count as right wherever the first label is gold."""
    broken = al.load(demo.base, dtype="float32")
    gates = broken.sites.where(tower="language", role="gate_proj")
    with torch.no_grad():
        broken.parameter(gates[0]).fill_(float("nan"))

    with pytest.raises(LensError, match="logits hold NaN"):
        al.evaluate(broken, task)
