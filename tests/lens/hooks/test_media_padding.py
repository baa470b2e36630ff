"""Padding of pictures and sounds enters no recording of a tower: not its mean, its moments or its rows."""

from functools import cache

import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import LensError
from affectlens.lens.hooks.media_masks import fitted
from affectlens.lens.hooks.places import place_of
from affectlens.sites import Point, Points
from tests.lens.families import Batch, logits
from tests.lens.padded_media import CASES, FAMILY, tiled
from tests.numbers import differ


@cache
def built(name: str) -> tuple[nn.Module, al.Lens]:
    model = FAMILY[name].build()
    return model, al.Lens(model)


def tower_points(name: str) -> Points:
    """Return one point for each place in the towers, and for what cross-attention reads of them."""
    model, lens = built(name)
    found: dict[object, Point] = {}
    for site in lens.sites:
        tower = site.tower in ("vision", "audio", "projector") or "encoder_attn" in site.label
        if not tower or site.param == "bias" or site.role == "pos_embed":
            continue
        for kind in ("output", "input", "residual"):
            try:
                place = place_of(Point(site, kind), model=model, live=lens.checkpoint)
            except LensError:
                continue
            found.setdefault((place.module, place.side), Point(site, kind))
    return Points(found.values())


def recorded(lens: al.Lens, point: Point, *batches: Batch) -> tuple[int, torch.Tensor] | None:
    """Return the number of rows and their mean; None where the recording is refused."""
    try:
        found = lens.record(Points([point]), *batches, keep="mean")[point]
        return found.count, found.mean  # type: ignore[union-attr]
    except LensError as error:
        if "is padding is unknown" in str(error) or "so it has no mean" in str(error):
            return None
        raise


@pytest.mark.parametrize("case", CASES)
def test_a_mean_does_not_depend_on_what_stands_beside_an_example(case: str) -> None:
    """At every place of the towers, the rows of a padded batch are those of its examples alone."""
    name, make = CASES[case]
    _, lens = built(name)
    alone, together = make()
    compared = 0
    for point in tower_points(name):
        one, two = recorded(lens, point, *alone), recorded(lens, point, together)
        if one is None or two is None:
            continue
        compared += 1

        assert one[0] == two[0], point
        assert not differ(one[1].float(), two[1].float()), point
    assert compared > 20


@pytest.mark.parametrize("case", [case for case in CASES if "dropped" not in case])
def test_padding_is_not_counted(case: str) -> None:
    """At some places more passes than is recorded: the padding."""
    name, make = CASES[case]
    _, lens = built(name)
    batch = make()[1]
    every = [point for point in tower_points(name) if recorded(lens, point, batch)]
    passed = {point: lens.record(Points([point]), batch)[point] for point in every}

    assert any(one.values[..., 0].numel() > len(one.rows) for one in passed.values())  # type: ignore[union-attr]


def test_a_tower_has_the_rows_that_its_own_lengths_say() -> None:
    """Of 20 of 32 frames, Qwen2-Audio makes 10 positions, then 5."""
    _, heard = built("qwen2_audio")
    batch = CASES["a mask of frames"][1]()[1]
    rows = {
        point.site: recorded(heard, point, batch)
        for point in tower_points("qwen2_audio")
        if point.kind == "output" and point.site.layer in (0, None)
    }

    assert {found[0] for site, found in rows.items() if found and site.role == "q_proj"} == {10 + 16}
    assert {found[0] for found in rows.values() if found} == {20 + 32, 10 + 16, 5 + 8}


def test_tiles_that_pad_a_picture_are_left_out() -> None:
    """Mllama pads to four tiles, and each tile to eight patches; the text attends to real ones alone."""
    _, lens = built("mllama")
    batch, patches = tiled(), 5
    for site in lens.sites.where(param="weight"):
        if "cross_attn" in site.label and site.role in ("k_proj", "v_proj"):
            assert len(lens.record(Points([Point(site)]), batch)[Point(site)].rows) == 3 * patches  # type: ignore[union-attr]
        if site.tower == "vision" and site.role in ("q_proj", "norm", "fc1"):
            assert len(lens.record(Points([Point(site)]), batch)[Point(site)].rows) == 3 * patches  # type: ignore[union-attr]


def test_a_padded_tower_is_patched_whole() -> None:
    """A patch of a tower with its own activations changes nothing, padding included."""
    model, lens = built("qwen2_audio")
    batch = CASES["a mask of frames"][1]()[1]
    where = lens.sites.where(tower="audio", role="o_proj", param="weight").at("output")
    recording = lens.record(where, batch)
    expected = logits(model, batch)
    with lens.intervene(al.Patch(where, source=recording)):
        found = logits(model, batch)

    assert torch.equal(expected, found)


def test_batches_of_a_tower_join_with_and_without_padding() -> None:
    """A batch without padding beside one with it keeps all of its rows."""
    _, lens = built("qwen2_audio")
    alone, together = CASES["a mask of frames"][1]()
    point = lens.sites.where(tower="audio", role="o_proj", param="weight").at("output")[0]
    found = lens.record(Points([point]), alone[1], together)[point]

    assert len(found.rows) == 16 + 26  # type: ignore[union-attr]


def test_padding_of_unknown_place_is_refused() -> None:
    """Where the mask fits no dimension of the activations, nothing is recorded."""
    _, lens = built("idefics2")
    batch = CASES["part of a picture before a resampler"][1]()[1]
    site = lens.sites.where(tower="projector", role="k_proj", param="weight")[0]

    with pytest.raises(LensError, match=r"which part of activations of shape .* is padding is unknown"):
        lens.record(Points([Point(site)]), batch)


FITS = [
    ([[1, 1, 0, 0]], (1, 4), [[1, 1, 0, 0]]),
    ([[1, 1, 1, 0]], (1, 2), [[1, 1]]),  # every second frame
    ([[1, 0], [1, 1]], (4,), [1, 0, 1, 1]),
    ([[1, 0], [1, 1]], (3,), [1, 1, 1]),  # packed without padding
    ([[[1, 0], [0, 0]]], (1, 1), [[1]]),  # a block with one real patch
    ([[[1], [0]]], (1, 4, 2), [[[1, 1]] * 2 + [[0, 0]] * 2]),  # a mask of patches on pixels
    ([[1, 0]], (1, 7), None),
]


@pytest.mark.parametrize(("mask", "sizes", "expected"), FITS)
def test_a_mask_fits_by_its_shape(mask: list[object], sizes: tuple[int, ...], expected: list[object]) -> None:
    """A mask is taken as it is, thinned out, pooled, flattened, or not at all."""
    found = fitted(torch.tensor(mask).bool(), sizes)

    assert (None if found is None else found.int().tolist()) == expected
