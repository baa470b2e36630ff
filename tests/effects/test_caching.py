"""Towers that no intervention changes run once per input, with the same bits."""

import torch
from torch import nn

import affectlens as al
from affectlens.effects.caching import remembering, remembering_senses


def test_senses_are_remembered_to_the_bit(lens: al.Lens, demo: al.Demo) -> None:
    """With the vision tower run once, the logits have the same bits, and no hook is left behind."""
    task = demo.task("faces-unseen")
    batch = lens.prepare(*task.examples[:8], prompt=task.prompt)
    expected = lens.run(batch)

    language, vision = (lens.sites.where(tower=tower) for tower in ("language", "vision"))
    with remembering_senses(lens.model, lens.checkpoint, changed=language) as towers:
        assert ["model.vision_tower"] == towers
        assert torch.equal(expected, lens.run(batch))
        assert torch.equal(expected, lens.run(batch))
    with remembering_senses(lens.model, lens.checkpoint, changed=vision) as towers:
        assert [] == towers
    assert [] == [m for m in lens.model.modules() if "forward" in vars(m)]


def test_the_memory_of_a_tower_sees_into_lists() -> None:
    """Lists of different tensors are different inputs; with an object of unknown type, nothing is cached."""
    calls = []

    class Tower(nn.Module):
        def forward(self, *args: object, **kwargs: object) -> int:
            calls.append(args)
            return len(calls)

    tower, one, two = Tower(), torch.zeros(5000), torch.zeros(5000)
    two[2500] = 1
    with remembering(tower):
        assert [1, 2, 1] == [tower([x]) for x in (one, two, one)]
        assert [3, 4] == [tower(object()), tower(object())]
        assert [5, 5, 6] == [tower(one, mask={"a": x}) for x in (one, one, two)]
