"""Pictures, sounds, tiles, frames and words have names: the right positions, or an error that lists them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

import affectlens as al
from affectlens.errors import LensError, NoSuchSite
from affectlens.lens import Activations
from affectlens.lens.inputs.media_items import NO_SIZES, Sizes, items
from affectlens.lens.inputs.named_spans import TokenReader
from affectlens.sites import Span
from affectlens.sites.span_names import span_name
from tests.lens.families import BY_NAME, base
from tests.lens.processors import processor, tokenizer

PICTURED = (
    "llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "gemma3", "idefics3", "smolvlm", "internvl",
    "qwen2_5_omni",
)  # fmt: skip
Media = dict[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Write pictures and sounds of one size each."""
    folder = tmp_path_factory.mktemp("media")
    made = np.random.default_rng(0)
    for n in range(6):
        Image.fromarray(made.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        wavfile.write(folder / f"{n}.wav", 16_000, (made.normal(size=9000) * 3000).astype(np.int16))
    return {kind: [str(folder / f"{n}.{kind}") for n in range(6)] for kind in ("png", "wav")}


def lens_of(family: str) -> al.Lens:
    return al.Lens(base(family), processor(family))


def into(lens: al.Lens, batch: dict[str, Tensor], span: Span) -> Activations:
    """Return what goes into the first layer, which depends on nothing but each position's own token."""
    points = lens.sites.where(tower="language", layer=0, role="q_proj", param="weight").at("input", span=span)
    found = lens.record(points, batch)[points[0]]
    assert isinstance(found, Activations)
    return found


def depends(lens: al.Lens, one: list[Media], two: list[Media], span: Span, *, marks: int = 0) -> None:
    """Check that a span is the positions at which two batches of media differ, and marks of lines."""
    made = [
        lens.prepare(*(al.Example(str(n), "happy", "well?", **media) for n, media in enumerate(side)))
        for side in (one, two)
    ]
    first, second = (into(lens, batch, None).values for batch in made)
    changed = (first != second).any(-1)
    found = into(lens, made[0], span)

    assert changed.any(1).all()
    assert (changed.sum(1) + marks).tolist() == found.chosen.sum(1).tolist()  # type: ignore[union-attr]
    assert marks or torch.equal(first[changed], found.rows)
    assert {tuple(row) for row in first[changed].tolist()} <= {tuple(row) for row in found.rows.tolist()}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("family", PICTURED)
def test_a_picture_is_where_its_pixels_go(family: str, number: int, files: dict[str, list[str]]) -> None:
    """The span of a picture has exactly the positions that change when another picture is shown there."""
    png = files["png"]
    shown = [[png[0], png[1]], [png[2], png[3]]]
    other = [[*row[: number - 1], png[4 + n], *row[number:]] for n, row in enumerate(shown)]
    depends(
        lens_of(family),
        [{"images": tuple(row)} for row in shown],
        [{"images": tuple(row)} for row in other],
        f"image:{number}",
        marks=family == "llava_onevision",
    )


@pytest.mark.parametrize("number", [1, 2])
def test_a_sound_is_where_its_samples_go(number: int, files: dict[str, list[str]]) -> None:
    """The span of a sound has exactly the positions that change when another sound is heard there."""
    wav = files["wav"]
    heard = [[wav[0], wav[1]], [wav[2], wav[3]]]
    other = [[*row[: number - 1], wav[4 + n], *row[number:]] for n, row in enumerate(heard)]
    depends(
        lens_of("qwen2_audio"),
        [{"audio": tuple(row)} for row in heard],
        [{"audio": tuple(row)} for row in other],
        f"audio:{number}",
    )


@pytest.mark.parametrize(("family", "frame", "changed"), [
    ("qwen2_vl", 1, [0, 1]), ("qwen2_vl", 2, [2, 3]), ("qwen2_5_vl", 2, [2, 3]), ("llava_onevision", 3, [2]),
])  # fmt: skip
def test_a_frame_is_where_its_pixels_go(
    family: str, frame: int, changed: list[int], files: dict[str, list[str]]
) -> None:
    """A frame as the model sees it, which may join two of the film, has the positions that it changes."""
    film = files["png"][:4]
    other = [files["png"][4] if n in changed else file for n, file in enumerate(film)]
    depends(
        lens_of(family), [{"video": (tuple(film),)}], [{"video": (tuple(other),)}], f"video:1/frame:{frame}"
    )


def test_a_tile_is_where_its_pixels_go() -> None:
    """Where tiles of a picture stand side by side, each is a part of the picture."""
    lens, batch = lens_of("internvl"), BY_NAME["internvl"].batch()
    image = batch["input_ids"] == 255
    begins = image.int().argmax(1).tolist()
    rows = zip(batch["input_ids"], begins, strict=True)
    wide = [torch.cat([row[:at], row[at : at + 4], row[at:]]) for row, at in rows]
    tiled = {
        "input_ids": torch.stack(wide),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1),
        "pixel_values": torch.randn(4, 3, 56, 56),
    }
    other = {**tiled, "pixel_values": tiled["pixel_values"].clone()}
    other["pixel_values"][[1, 3]] += 1
    one, two = (into(lens, given, None).values for given in (tiled, other))

    assert torch.equal(one[(one != two).any(-1)], into(lens, tiled, "image:1/tile:2").rows)
    assert 16 == len(into(lens, tiled, "image:1").rows)
    with pytest.raises(LensError, match="tiles 1 to 2"):
        into(lens, tiled, "image:1/tile:3")


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_onevision"])
def test_beams_and_steps_see_the_same_picture(family: str, files: dict[str, list[str]]) -> None:
    """In `generate`, also with beams, a picture is the same positions, though its pixels are gone."""
    lens, png = lens_of(family), files["png"]
    examples = [al.Example("a", "happy", "well?", images=(png[0], png[1]))]
    examples.append(al.Example("b", "happy", "well?", images=(png[2], png[3])))
    batch = lens.prepare(*examples)
    alone = into(lens, batch, "image:2").values
    points = lens.sites.where(tower="language", layer=0, role="q_proj", param="weight").at(
        "input", span="image:2"
    )
    for beams in (1, 2):
        with lens.record(points) as recording:
            lens.model.generate(**batch, num_beams=beams, max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        found = recording[points[0]].values  # type: ignore[union-attr]

        assert torch.equal(alone.repeat_interleave(beams, dim=0), found)


def test_every_change_takes_a_named_span(files: dict[str, list[str]]) -> None:
    """A picture's name means its token numbers in each intervention and in recordings."""
    lens, png = lens_of("llava"), files["png"]
    batch = lens.prepare(al.Example("a", "happy", "well?", images=(png[0], png[1])))
    sites = lens.sites.where(tower="language", layer=0, role="o_proj", param="weight")
    numbers = tuple((batch["input_ids"][0] == 255).nonzero().flatten().tolist())[4:]
    changed: list[list[Tensor]] = [[], []]
    for found, span in zip(changed, ("image:2", numbers), strict=True):
        points = sites.at("output", span=span)
        recording = lens.record(sites, batch, where=span)
        vector = torch.ones(recording[points[0]].mean.shape)  # type: ignore[union-attr]
        for change in (
            al.Zero(points),
            al.Scale(points, factor=2.0),
            al.Steer(points, vector=vector),
            al.Mean(points, over=recording),
            al.Resample(points, over=recording),
            al.Knockout(sites, source=span, target="last"),
        ):
            with lens.intervene(change):
                found.append(lens.run(batch))
        with lens.intervene(al.Zero(sites)), lens.intervene(al.Patch(points, source=recording)):
            found.append(lens.run(batch))

    assert all(torch.equal(one, other) for one, other in zip(*changed, strict=True))
    assert all(not torch.equal(one, lens.run(batch)) for one in changed[0])


def test_a_number_that_is_not_there_is_an_error(files: dict[str, list[str]]) -> None:
    """The error lists the pictures of the example, and says which example it is."""
    lens, png = lens_of("llava"), files["png"]
    batch = lens.prepare(
        al.Example("a", "happy", "well?", images=(png[0], png[1])),
        al.Example("b", "happy", "well?", images=(png[0],)),
    )
    with pytest.raises(LensError, match=r"example 2 has no image:2\. It has image:1$"):
        into(lens, batch, "image:2")
    with pytest.raises(LensError, match="no tiles that can be told apart"):
        into(lens, batch, "image:1/tile:1")
    with pytest.raises(LensError, match="no audio"):
        into(lens, batch, "audio:1")


def test_a_word_is_its_tokens_wherever_it_occurs() -> None:
    """A whole word is found in each row, next to commas too, but not inside another word."""
    lens = lens_of("llama")
    batch = lens.prepare(
        al.Example("a", "sad", "sad, or sadness? so sad."), al.Example("b", "sad", "he is very sad today")
    )
    spelled = tokenizer().convert_tokens_to_ids(list("sad"))
    found = into(lens, batch, "text:sad")
    embedded = into(lens, {k: t[:1] for k, t in batch.items()}, None)
    there = [
        n for n in range(batch["input_ids"].shape[1]) if batch["input_ids"][0, n : n + 3].tolist() == spelled
    ]

    assert [6, 3] == found.chosen.sum(1).tolist()  # type: ignore[union-attr]
    assert 3 == len(there)
    places = [at + n for at in (there[0], there[2]) for n in range(3)]
    assert torch.allclose(embedded.values[0, places], found.values[0][found.chosen[0]])  # type: ignore[index]


def test_a_word_that_does_not_occur_is_an_error() -> None:
    """The error lists the words of the example."""
    lens = lens_of("llama")
    batch = lens.prepare(al.Example("a", "sad", "sad, or sadness? so sad"))
    with pytest.raises(LensError, match=r"'happy' is not in the text of example 1.*'sadness'"):
        into(lens, batch, "text:happy")
    with pytest.raises(LensError, match="tokenizer"):
        into(al.Lens(base("llama")), batch, "text:sad")


def test_a_word_of_a_script_without_spaces_may_stand_inside_a_run() -> None:
    """Chinese words have no spaces around them, and a character may be several tokens."""

    class Bytes:
        def decode(self, ids: list[int], **_: object) -> str:
            return bytes(ids).decode(errors="replace")

    text = "他很伤心。".encode()
    found = TokenReader({}, Bytes()).chosen(
        span_name("text:伤心"),
        torch.tensor([list(text)]),
        own=torch.ones(1, len(text), dtype=torch.bool),
        sizes=NO_SIZES,
    )

    assert list(range(6, 12)) == found[0].nonzero().flatten().tolist()


def test_pictures_that_stand_side_by_side_are_told_apart_by_their_grids() -> None:
    """One run of placeholders is two pictures where the grids say so, and an error where nothing does."""
    places = torch.ones(1, 6, dtype=torch.bool)
    grids = Sizes({"image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 4]])}, {})
    found = items("image", places, sizes=grids, config=None)

    assert [[0, 1], [2, 3, 4, 5]] == [[column for _, column in one.places] for one in found]
    with pytest.raises(LensError, match="apart"):
        items("image", places, sizes=NO_SIZES, config=None)


@pytest.mark.parametrize(
    "span", ["image:0", "image:x", "image:1/frame:2", "audio:1/tile:1", "text:", "prompt:1", "words"]
)
def test_a_name_that_is_no_span_is_refused_at_once(span: str) -> None:
    """A span with a mistake is an error before anything runs."""
    with pytest.raises(NoSuchSite, match="no span"):
        al.Lens(base("llama")).sites.at("residual", span=span)


def test_lines_of_a_picture_are_told_from_pictures_by_their_sizes() -> None:
    """Where each line of a picture is a run, as in Pixtral, the areas say where a picture ends."""
    places = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    lines = Sizes({"image_sizes": torch.tensor([[28, 28], [14, 42]])}, {})
    found = items("image", places, sizes=lines, config=None)

    assert [[0, 1, 3, 4], [6, 7, 8]] == [[column for _, column in one.places] for one in found]
    inside = Sizes({"image_sizes": torch.tensor([[14, 42], [28, 28]])}, {})  # the cut would be inside a run
    with pytest.raises(LensError, match="apart"):
        items("image", places, sizes=inside, config=None)
