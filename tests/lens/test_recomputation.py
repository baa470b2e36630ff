"""Layers that are recomputed in the backward pass are refused inside a block, and only where they are."""

import warnings

import pytest
import torch

import affectlens as al
from affectlens.errors import LensError
from tests.lens.families import BY_NAME


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "t5_gated"])
def test_gradient_checkpointing_is_refused_in_training(family: str, reentrant: bool) -> None:
    """In evaluation mode, without gradients and outside a block it is of no concern."""
    model, batch = BY_NAME[family].build(), BY_NAME[family].batch()
    with warnings.catch_warnings(action="ignore"):  # transformers is about to rename it
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    lens = al.Lens(model)
    points = lens.sites.where(tower="language", role="down_proj").at("output")
    plain = lens.run(batch)

    model.train()
    for block in (lens.intervene(al.Scale(points, factor=2.0)), lens.record(points)):
        with pytest.raises(LensError, match="gradient_checkpointing_disable"), block:
            model(**batch)
    with lens.intervene(al.Scale(points, factor=2.0)), torch.no_grad():
        model(**batch)
    with lens.intervene(al.Scale(points, factor=2.0)):
        assert not torch.equal(plain, lens.run(batch))
    assert torch.equal(plain, lens.run(batch))
