"""Mean and Resample leave what is usual at a point: the mean, or what passed there on other inputs."""

import torch

import affectlens as al
from tests.lens.families import BY_NAME, base
from tests.numbers import differ


def test_resampled_rows_are_rows_that_occurred() -> None:
    """Each position gets what passed somewhere in the examples, all points from the same position."""
    lens, batch = al.Lens(base("llama")), BY_NAME["llama"].batch()
    points = lens.sites.where(role="down_proj").at("output")
    source = lens.record(points, batch)
    with lens.intervene(al.Resample(points, over=source, seed=4)):
        found = lens.record(points, batch)
    drawn = []
    for point in points:
        rows, new = source[point].rows, found[point].values.flatten(0, 1)
        same = (new[:, None] == rows[None]).all(-1)
        assert bool(same.any(1).all())
        drawn.append(same.int().argmax(1).tolist())

    with lens.intervene(al.Resample(points, over=source, seed=4)):
        same = lens.run(batch)
    with lens.intervene(al.Resample(points, over=source, seed=4)):
        assert torch.equal(same, lens.run(batch))
    with lens.intervene(al.Resample(points, over=source, seed=5)):
        assert differ(same, lens.run(batch))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 3


def test_the_mean_over_examples_is_that_of_a_recording(demo: al.Demo, lens: al.Lens) -> None:
    """Examples with pictures are run and averaged, as `record` does."""
    task = demo.task("faces-unseen")
    points = lens.sites.where(tower="language", role="down_proj").at("output", span="image")
    examples, prompt = task.examples[:4], task.prompt
    recorded = lens.record(points, *examples, prompt=prompt, keep="mean")
    logits = []
    for over in (examples, recorded):
        with lens.intervene(al.Mean(points, over=over, prompt=prompt)):
            logits.append(lens.logits(*examples[:2], prompt=prompt))

    assert torch.equal(*logits)
    assert differ(logits[0], lens.logits(*examples[:2], prompt=prompt))
