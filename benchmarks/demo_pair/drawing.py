"""Draw every emoji of every art set once, as RGBA at 112 px, and cut sprite sheets.

112 px is what the teacher sees; the student sees the same picture shrunk to 64 px. Keeping
the alpha channel lets each augmentation choose its own background.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fetching import emotions_file
from PIL import Image

BIG, SMALL = 112, 64
TRAIN_STYLES = ("noto", "fluent3d", "fluentflat", "fluentmodern", "emojione")
VALIDATION_STYLE, TEST_STYLE = "openmoji", "twemoji"
STYLES = (*TRAIN_STYLES, VALIDATION_STYLE, TEST_STYLE)
FOLDERS = {
    "noto": ("package/img/google/64", ".png"),
    "twemoji": ("package/img/twitter/64", ".png"),
    "fluent3d": ("package/assets", ".webp"),
    "fluentflat": ("package/assets", ".svg"),
    "fluentmodern": ("package/assets", ".svg"),
    "emojione": ("package/assets/png_128x128", ".png"),
    "openmoji": ("package/color/svg", ".svg"),
}
KINDS = {
    "Food & Drink": "food",
    "Animals & Nature": "nature",
    "Travel & Places": "travel",
    "Objects": "object",
    "Activities": "activity",
}


@dataclass(frozen=True)
class Emoji:
    """One code point sequence with the labels this project uses."""

    code: str
    name: str
    category: str
    emotion: str | None

    @property
    def kind(self) -> str | None:
        return KINDS.get(self.category)


def emoji_list(work: Path) -> list[Emoji]:
    """Read the emoji without flags, skin tones and components, in a fixed order."""
    with emotions_file().open() as file:
        emotions = {row["unified"]: row["emotion"] for row in csv.DictReader(file)}
    rows = json.loads((work / "raw/meta/package/emoji.json").read_text())
    kept = [
        Emoji(r["unified"], r["short_name"], r["category"], emotions.get(r["unified"]))
        for r in rows
        if r["category"] not in ("Flags", "Component", "Symbols")
    ]
    # 'People & Body' is mostly the same person with another job; a part is enough.
    kept = [e for e in kept if e.category != "People & Body" or "-" not in e.code]
    return sorted(kept, key=lambda e: e.code)


def _spellings(code):
    """Return the possible file names: sets differ in case, FE0F and leading zeros."""
    whole = code.lower()
    bare = "-".join(p for p in whole.split("-") if p != "fe0f")
    for form in (whole, bare, bare + "-fe0f"):
        stripped = "-".join(p.lstrip("0") for p in form.split("-"))
        yield from (form, stripped, form.upper())


def _open(path):
    if path.suffix == ".svg":
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_path=str(path), width=2 * BIG, height=2 * BIG)
        return Image.open(io.BytesIO(bytes(png)))
    return Image.open(path)


def _centred(picture):
    """Cut to the drawn part and centre it: the sets differ most in their margins."""
    left, top, right, bottom = picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    side = round(max(right - left, bottom - top) * 1.06)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return picture.crop((x, y, x + side, y + side))


def _draw(work, style, emoji):
    folder, suffix = FOLDERS[style]
    for name in _spellings(emoji.code):
        path = work / "raw" / style / folder / (name + suffix)
        if path.exists():
            picture = _centred(_open(path).convert("RGBA"))
            # Premultiplied, so that transparent pixels bleed no colour into the edges.
            picture = picture.convert("RGBa").resize((BIG, BIG), Image.Resampling.LANCZOS)
            return np.asarray(picture.convert("RGBA"))
    return None


def draw_all(work: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return style -> code -> RGBA array [112, 112, 4], cached on disk."""
    drawn = {}
    for style in STYLES:
        cache = work / f"drawn-{style}.npz"
        if not cache.exists():
            found = {e.code: _draw(work, style, e) for e in emoji_list(work)}
            found = {code: pixels for code, pixels in found.items() if pixels is not None}
            np.savez(cache, codes=np.array(list(found)), pixels=np.stack(list(found.values())))
        with np.load(cache) as file:
            drawn[style] = dict(zip(file["codes"].tolist(), file["pixels"], strict=True))
    return drawn


def on_white(rgba: np.ndarray, quarter_turns: int = 0) -> Image.Image:
    """Return the plain evaluation picture: 64 px, white ground, turned clockwise."""
    picture = Image.fromarray(rgba)
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    small = ground.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BILINEAR)
    return small.rotate(-90 * quarter_turns)


def save_sheet(pictures: list[Image.Image], path: Path, columns: int = 12) -> list[str]:
    """Write one lossless WebP sheet; return each picture's media fragment."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * SMALL, rows * SMALL), "white")
    places = []
    for number, picture in enumerate(pictures):
        x, y = number % columns * SMALL, number // columns * SMALL
        sheet.paste(picture, (x, y))
        places.append(f"{path.name}#xywh={x},{y},{SMALL},{SMALL}")
    sheet.save(path, lossless=True, quality=100, method=6)
    return places
