"""A batch padded on the right: logits and gradients are those at each row's last token."""

import pytest
import torch
from torch import Tensor

import affectlens as al
from affectlens.lens import Activations
from affectlens.lens.inputs.row_ends import row_ends
from affectlens.sites import Points
from tests.lens.families import BY_NAME, NAMES, Batch, base, lens_of
from tests.numbers import differ

CAUSAL = [name for name in NAMES if not BY_NAME[name].decodes]


def right_padded(batch: Batch) -> Batch:
    """Return the batch with the padding of each row behind its tokens."""
    order = torch.sort(batch["attention_mask"], dim=1, descending=True, stable=True).indices
    shape = batch["input_ids"].shape
    return {name: t.gather(1, order) if t.shape == shape else t for name, t in batch.items()}


def down(lens: al.Lens, span: str) -> Points:
    sites = lens.sites.where(tower="language", layer=0, param="weight")
    return sites[:1].at("residual", span=span)


def measured(lens: al.Lens, batch: Batch, points: Points) -> tuple[Tensor, Activations]:
    """Return the logits that a metric sees, and the values and gradients at the points."""
    seen = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(logits.detach().clone())
        return logits[:, 5] - logits[:, 7]

    found = lens.record(points, batch, metric=metric)[points[0]]
    assert isinstance(found, Activations)
    return seen[0], found


@pytest.mark.parametrize("name", CAUSAL)
def test_the_side_of_the_padding_changes_nothing(name: str) -> None:
    """Logits, gradients and interventions are the same on either side, at the last token of each row."""
    lens, left = lens_of(base(name)), BY_NAME[name].batch()
    right, last = right_padded(left), down(lens_of(base(name)), "last")
    (logits, passed), (others, theirs) = (measured(lens, batch, last) for batch in (left, right))

    assert not differ(logits, others)
    assert not differ(lens.run(left, last=3), lens.run(right, last=3))
    assert not differ(passed.values, theirs.values)
    assert passed.gradients is not None
    assert theirs.gradients is not None
    assert not differ(passed.gradients, theirs.gradients)
    assert passed.gradients.abs().amax((1, 2)).min() > 0
    with lens.intervene(al.Scale(last, factor=-3.0)):
        changed, other = lens.run(left), lens.run(right)

    assert not differ(changed, other)
    assert differ(changed, lens.run(left))


@pytest.mark.parametrize("name", CAUSAL)
def test_an_answer_is_the_end_of_each_row(name: str) -> None:
    """The last tokens of a row count as the answer, wherever its padding is."""
    lens, left = lens_of(base(name)), BY_NAME[name].batch()
    right = right_padded(left)
    for span in ("generated", "last", "prompt"):
        with lens.intervene(al.Scale(down(lens, span), factor=-3.0)):
            changed, other = (lens.run(batch, last=3, answer=2) for batch in (left, right))

        assert not differ(changed, other), span
        assert differ(changed, lens.run(left, last=3)), span


def test_logits_of_all_positions_have_their_own_ends() -> None:
    """Where the head is recorded, a metric still sees the last token of each row."""
    lens, left = lens_of(base("llama")), BY_NAME["llama"].batch()
    head = lens.sites.where(role="lm_head").at("output", span="last")
    logits, passed = measured(lens, right_padded(left), head)

    assert not differ(logits, lens.run(left)[:, 0])
    assert not differ(logits, passed.values[:, 0])


def test_a_row_that_is_shorter_than_asked_begins_with_padding() -> None:
    """Rows keep their order; the missing ones come first."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    found = row_ends(torch.arange(6.0).reshape(2, 3, 1), mask, count=2)

    assert [[2.0, 0.0], [4.0, 5.0]] == found[..., 0].tolist()
