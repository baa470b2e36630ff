"""Pictures: read as people see them, against Pillow's and numpy's own readings, or refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from affectlens.errors import Remark, TaskError
from affectlens.tasks import open_film, open_picture

GREYS = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)  # 0 … 64,491
IN_8_BITS = np.rint(GREYS / 257).astype(np.uint8)
MARKED = np.zeros((40, 60, 3), np.uint8)
MARKED[:, :30], MARKED[:20, 30:] = (200, 30, 30), (30, 200, 30)
CLEAR = np.zeros((4, 4, 4), np.uint8)  # red of alpha 255, 128 and 0
CLEAR[..., 0], CLEAR[0, 0, 3], CLEAR[1, 1, 3] = 200, 255, 128
ON_WHITE = [[200, 0, 0], [227, 127, 127], [255, 255, 255]]


def pixels(source: Path | str) -> np.ndarray:
    return np.asarray(open_picture(str(source)))


def test_pictures_are_cut_from_sheets(tmp_path: Path) -> None:
    """A media fragment cuts one picture from a sheet; a fragment outside the sheet is an error."""
    sheet = Image.new("RGB", (20, 10), "white")
    sheet.putpixel((12, 3), (255, 0, 0))
    sheet.save(tmp_path / "sheet.png")
    (tmp_path / "text.png").write_text("no picture")

    assert (255, 0, 0) == open_picture(f"{tmp_path}/sheet.png#xywh=10,0,10,10").getpixel((2, 3))
    for source, message in (
        (f"{tmp_path}/sheet.png#xywh=15,0,10,10", "not inside its sheet of 20 × 10 pixels"),
        (f"{tmp_path}/none.png", "no such picture"),
        (f"{tmp_path}/text.png", "can't be read"),
    ):
        with pytest.raises(TaskError, match=message):
            open_picture(source)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_pictures_are_turned_as_exif_says(suffix: str, orientation: int, tmp_path: Path) -> None:
    """Each of EXIF's eight ways gives what Pillow and transformers give; other numbers change nothing."""
    file = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(MARKED).save(file, exif=exif, lossless=True, quality=95)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))

    np.testing.assert_array_equal(expected, pixels(file))
    np.testing.assert_array_equal(np.asarray(load_image(str(file))), pixels(file))


def test_a_sheet_is_cut_as_it_is_seen(tmp_path: Path) -> None:
    """Fragments count pixels of the turned picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(MARKED).save(tmp_path / "a.png", exif=exif)

    turned = np.rot90(MARKED, -1)
    np.testing.assert_array_equal(turned[50:60, 5:25], pixels(f"{tmp_path}/a.png#xywh=5,50,20,10"))


def test_a_broken_exif_block_turns_nothing(tmp_path: Path) -> None:
    """Viewers show such a picture as it lies."""
    stream = io.BytesIO()
    Image.fromarray(MARKED).save(stream, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())

    assert (40, 60, 3) == pixels(tmp_path / "a.jpg").shape


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "a.pgm"])
def test_16_bits_keep_their_brightness(name: str, tmp_path: Path) -> None:
    """White of 65,535 is 255; Pillow's own conversion would make everything above 255 white."""
    values = GREYS.astype(">u2") if name.startswith("big") else GREYS
    Image.fromarray(values).save(tmp_path / name)

    np.testing.assert_array_equal(np.repeat(IN_8_BITS[..., None], 3, axis=2), pixels(tmp_path / name))


def test_16_bits_may_begin_with_white(tmp_path: Path) -> None:
    """A TIFF may say that 0 is white, and a PNG that one value is transparent."""
    Image.fromarray(GREYS).save(tmp_path / "a.tif", tiffinfo={262: 0})
    Image.fromarray(GREYS).save(tmp_path / "a.png", transparency=int(GREYS[3, 4]))
    clear = IN_8_BITS.copy()
    clear[3, 4] = 255

    np.testing.assert_array_equal(np.rint((65535 - GREYS) / 257), pixels(tmp_path / "a.tif")[..., 0])
    np.testing.assert_array_equal(clear, pixels(tmp_path / "a.png")[..., 0])


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "CMYK"])
def test_an_uncompressed_tiff_that_lies_on_its_side_is_turned(mode: str, tmp_path: Path) -> None:
    """Its rows have the length that the file states, not that of the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = (
        Image.fromarray(GREYS) if mode == "I;16" else Image.fromarray(GREYS.astype(np.uint8)).convert(mode)
    )
    lying.save(tmp_path / "plain.tif")
    lying.save(tmp_path / "lying.tif", exif=exif)

    expected = np.rot90(pixels(tmp_path / "plain.tif"), k=-1)
    np.testing.assert_array_equal(pixels(tmp_path / "lying.tif"), expected)


def test_16_bits_are_turned_too(tmp_path: Path) -> None:
    """Orientation and depth do not exclude each other."""
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(GREYS).save(tmp_path / "a.png", exif=exif)

    np.testing.assert_array_equal(np.rot90(IN_8_BITS), pixels(tmp_path / "a.png")[..., 0])


@pytest.mark.parametrize("most", [1, 255])
@pytest.mark.parametrize("suffix", ["tif", "pfm"])
def test_floating_point_numbers_have_two_ranges(suffix: str, most: int, tmp_path: Path) -> None:
    """From 0 to 1, or from 0 to 255, white is the largest."""
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values * most).save(tmp_path / f"a.{suffix}")

    np.testing.assert_array_equal(np.rint(values * 255), pixels(tmp_path / f"a.{suffix}")[..., 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 1000]], np.float32), "floating-point numbers from 0 to 1000"),
        (np.array([[-0.5, 0.5]], np.float32), "from -0.5 to 0.5, and which number is white is not known"),
        (np.array([[0, np.nan]], np.float32), "floating-point numbers from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "floating-point numbers from 0 to inf"),
        (np.array([[0, 70_000]], np.int32), "integers from 0 to 70000.*save it with 8 or 16 bits"),
    ],
)
def test_other_ranges_are_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    """Nobody knows which number is white."""
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(TaskError, match=message):
        open_picture(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_pictures_lie_on_white(suffix: str, tmp_path: Path) -> None:
    """The colour of a hidden pixel is not shown, and half transparent ones are mixed with white."""
    Image.fromarray(CLEAR).save(tmp_path / f"a.{suffix}", lossless=True, exact=True)
    found = pixels(tmp_path / f"a.{suffix}")

    assert ON_WHITE == [found[n, n].tolist() for n in range(3)]


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("1", 1, (255, 255, 255)), ("L", 9, (9, 9, 9)), ("LA", (9, 255), (9, 9, 9)),
        ("LA", (9, 0), (255, 255, 255)), ("P", 1, (255, 255, 255)), ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
    ],
)  # fmt: skip
def test_other_kinds_of_pixels(
    mode: str, colour: int | tuple[int, ...], seen: tuple[int, ...], tmp_path: Path
) -> None:
    """Palettes, greys with and without alpha, and black and white become RGB."""
    image = Image.new(mode, (4, 4), colour)
    if mode == "P":
        image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(tmp_path / "a.png", **({"transparency": 1} if mode == "P" else {}))

    assert seen == open_picture(str(tmp_path / "a.png")).getpixel((1, 1))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_as_pillow_converts_it(suffix: str, tmp_path: Path) -> None:
    """Inks, also inverted ones as in a JPEG, become RGB."""
    file = tmp_path / f"a.{suffix}"
    Image.new("CMYK", (8, 8), (10, 20, 30, 40)).save(file)
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels(file))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_an_animation_is_its_first_frame(name: str, tmp_path: Path) -> None:
    """As a picture it is the first frame, with a remark; the small copies in a camera's JPEG are none."""
    first, *more = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=more, lossless=True)
    first.save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=more)

    with pytest.warns(Remark, match="has several frames, of which the first is used; as `video` all are"):
        assert [255, 0, 0] == pixels(tmp_path / name)[0, 0].tolist()
    assert 2 == len(open_film(str(tmp_path / name)).frames)
    assert 250 < pixels(tmp_path / "camera.jpg")[0, 0, 0]


def test_frames_of_an_animation_lie_on_white(tmp_path: Path) -> None:
    """Films are seen as pictures are."""
    first, second = Image.fromarray(CLEAR), Image.fromarray(CLEAR[::-1])
    first.save(tmp_path / "a.png", save_all=True, append_images=[second], duration=100, disposal=1)

    assert ON_WHITE[2] == np.asarray(open_film(str(tmp_path / "a.png")).frames[0])[2, 2].tolist()
