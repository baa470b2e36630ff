"""Parts taken out of stored tensors go back to exactly where they were."""

import pytest
import torch

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.memory import MemoryStore
from affectlens.checkpoints.slicing import put, rows, take
from affectlens.sites import Cut, Storage
from affectlens.sites.site import stored

SHAPES = {
    "concatenated rows": ((12, 4), None, Cut(0, 4, 8), False),
    "one of every head": ((12, 4), None, Cut(0, 1, 3, 6), False),
    "interleaved columns of an expert": ((3, 4, 8), 1, Cut(2, 1, 2, 2), True),
    "half of an expert": ((3, 8, 4), 2, Cut(1, 4, 8), False),
    "transposed": ((4, 12), None, Cut(1, 4, 8), True),
    "a stacked bias": ((3, 8), 0, Cut(1, 0, 1, 2), False),
    "a whole tensor": ((5,), None, None, False),
}


@pytest.mark.parametrize("case", SHAPES)
def test_taking_out_and_putting_back(case: str) -> None:
    """A part has the declared values, and writing it changes no other element."""
    shape, expert, cut, transposed = SHAPES[case]
    tensor = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    where = stored("t", shape, expert=expert, cut=cut, transposed=transposed)

    fetched = tensor if rows(where) is None else tensor[rows(where)]
    values = take(fetched, where).clone()

    assert where.shape == tuple(values.shape)
    changed = tensor.clone()
    put(changed, where, value=-values - 1)
    assert (changed < 0).sum() == values.numel()
    assert set(values.flatten().tolist()) == set(tensor[changed < 0].tolist())
    put(changed, where, value=values)
    assert torch.equal(tensor, changed)


def test_the_sites_of_a_fused_checkpoint_add_up() -> None:
    """With experts stacked, transposed and interleaved, each element is in exactly one site."""
    names = {
        "gate_up_proj": (3, 4, 12),
        "gate_up_proj_bias": (3, 12),
        "down_proj": (3, 6, 4),
        "down_proj_bias": (3, 4),
    }
    start, tensors = 0.0, {}
    for name, shape in names.items():
        size = int(torch.tensor(shape).prod())
        tensors[f"model.layers.0.mlp.experts.{name}"] = torch.arange(start, start + size).reshape(shape)
        start += size

    checkpoint = Checkpoint(MemoryStore(tensors, config={"model_type": "gpt_oss"}))

    found = torch.cat([checkpoint.read(site).flatten() for site in checkpoint.sites])
    assert sorted(found.tolist()) == list(map(float, range(int(start))))
    (gate,) = checkpoint.sites.where(role="gate_proj", expert=1, param="weight").expect(1)
    assert torch.equal(tensors["model.layers.0.mlp.experts.gate_up_proj"][1, :, ::2].T, checkpoint.read(gate))
    assert isinstance(checkpoint.storage[gate], Storage)
