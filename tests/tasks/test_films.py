"""Films: frames taken as they are, at even distances, and refused where they can't be read."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from affectlens.errors import MissingExtra, TaskError
from affectlens.tasks import films, open_film
from tests import clips

COLOURS = ("red", "green", "blue", "white", "black")


def colours(folder: Path, count: int, *, size: tuple[int, int] = (4, 4)) -> list[str]:
    """Write frames numbered from 0, each in its own grey."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"f{n}.png" for n in range(count)]
    for n, file in enumerate(files):
        Image.new("RGB", size, (n, n, n)).save(file)
    return [str(file) for file in files]


def greys(film: films.Film) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in film.frames]  # type: ignore[index]


def test_films_are_folders_lists_and_animations(tmp_path: Path) -> None:
    """A film is the same however its frames are given; only an animation has a rate."""
    files = colours(tmp_path / "film", 12)
    pictures = [Image.open(file) for file in files]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)
    pictures[0].save(
        tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=100, lossless=True
    )

    expected = list(range(12))
    assert expected == greys(open_film(files))
    assert expected == greys(open_film(str(tmp_path / "film")))  # f2 comes before f10
    assert None is open_film(files).fps
    for name in ("a.png", "a.webp"):
        film = open_film(str(tmp_path / name))
        assert expected == greys(film)
        assert pytest.approx(10.0) == film.fps


def test_a_gif_is_a_film(tmp_path: Path) -> None:
    """A still GIF is a film of one frame."""
    pictures = [Image.new("RGB", (4, 4), colour) for colour in COLOURS]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=500)
    pictures[0].save(tmp_path / "still.gif")

    film = open_film(str(tmp_path / "a.gif"))
    assert [(255, 0, 0), (0, 128, 0), (0, 0, 255)] == [f.getpixel((0, 0)) for f in film.frames[:3]]
    assert (5, 2.0) == (len(film.frames), film.fps)
    assert 1 == len(open_film(str(tmp_path / "still.gif")).frames)


def test_frames_are_taken_at_even_distances(tmp_path: Path) -> None:
    """They include the first and the last, and the rate of an animation is that of the frames taken."""
    files = colours(tmp_path / "film", 31)
    pictures = [Image.open(file) for file in files]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)

    assert [0, 10, 20, 30] == greys(open_film(files, 4))
    film = open_film(str(tmp_path / "a.png"), 4)
    assert ([0, 10, 20, 30], pytest.approx(4 / 3.1)) == (greys(film), film.fps)
    assert films.FRAMES == len(open_film(colours(tmp_path / "long", films.FRAMES + 9)).frames)


def test_films_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty films, frames of two sizes, links out of a folder and broken files are errors that name them."""
    monkeypatch.setitem(sys.modules, "av", None)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "none").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "own.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(tmp_path / "own.png")
    (tmp_path / "text.gif").write_text("#EXTM3U\nfile:///etc/passwd\n")
    two = [*colours(tmp_path / "two", 1), *colours(tmp_path / "sizes", 1, size=(5, 4))]
    began = time.monotonic()
    for source, message in (
        (str(tmp_path / "pipe"), "not an ordinary file"),
        ("/dev/zero", "not an ordinary file"),
        ("https://example.org/x.mp4", "no such film"),
        (str(tmp_path / "none"), "has no frames"),
        ((), "has no frames"),
        (str(tmp_path / "linked"), "a link out of the folder"),
        (str(tmp_path / "text.gif"), "this film can't be read"),
        (two, "must have one size, got 4 × 4, 5 × 4"),
        ([*two[:1], "missing.png"], "no such picture"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            open_film(source)
        assert str(caught.value).isprintable()
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    with pytest.raises(
        MissingExtra, match=r"needs av: pip install 'affectlens\[media\]', or give its frames"
    ):
        open_film(str(tmp_path / "a.mp4"))
    assert 5 > time.monotonic() - began


# The upper left of a display matrix → how often it turns a frame by 90° to the left; whether after a flip.
MATRICES = {
    (1, 0, 0, 1): (0, False), (0, -1, 1, 0): (1, False),
    (-1, 0, 0, -1): (2, False), (0, 1, -1, 0): (3, False),
    (-1, 0, 0, 1): (0, True), (0, 1, 1, 0): (1, True),
    (1, 0, 0, -1): (2, True), (0, -1, -1, 0): (3, True),
}  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_films_are_turned_as_players_show_them(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    """A phone stores what its sensor sees and a display matrix; av's rotation says the same."""
    av = pytest.importorskip("av", reason="av reads and writes films")
    file = clips.laid(clips.film(tmp_path / "a.mp4"), tmp_path / "b.mp4", matrix)
    with av.open(str(file)) as opened:
        stored = next(opened.decode(video=0))
    turns, flips = MATRICES[matrix]
    pixels = stored.to_ndarray(format="rgb24")
    expected = np.rot90(pixels[:, ::-1] if flips else pixels, turns)
    found = np.asarray(open_film(str(file), 1).frames[0])

    np.testing.assert_array_equal(expected, found)
    if not flips:
        assert (stored.rotation - 90 * turns) % 360 == 0


def test_other_turns_are_refused(tmp_path: Path) -> None:
    """A film that lies at an angle, or is stretched, has to be encoded anew."""
    pytest.importorskip("av", reason="av reads and writes films")
    film = clips.film(tmp_path / "a.mp4")
    for matrix in ((1, 1, -1, 1), (2, 0, 0, 1), (0, 0, 0, 0)):
        laid = clips.laid(film, tmp_path / "b.mp4", matrix)
        with pytest.raises(TaskError, match=r"b\.mp4': its display matrix turns or stretches this film"):
            open_film(str(laid))


def test_a_film_says_whether_it_sounds(tmp_path: Path) -> None:
    """Only a file with a sound track does; one without pictures is no film."""
    pytest.importorskip("av", reason="av reads and writes films")
    film, silent = clips.film(tmp_path / "a.mp4"), clips.film(tmp_path / "b.mp4", sound=False)
    sound = clips.film(tmp_path / "c.m4a", pictures=False)

    assert (True, 10) == (open_film(str(film)).sound, len(open_film(str(film)).frames))
    assert not open_film(str(silent)).sound
    assert not open_film(colours(tmp_path / "film", 2)).sound
    with pytest.raises(TaskError, match="this file has no pictures; give it as a sound"):
        open_film(str(sound))
