"""Number the pictures, sounds and videos in the tokens of a batch, and their tiles and frames.

    placeholders, and the sizes that the model is given ──▶ Item: the positions of a picture, and of its tiles

Runs of placeholders alone don't tell: two pictures may stand side by side, and one picture may be several
runs. Where the sizes don't tell either, it is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from affectlens.errors import LensError

# Model types with one picture for each row of `pixel_values`, all with the same number of tokens …
_EVEN = (
    "llava", "vipllava", "video_llava", "paligemma", "gemma3", "gemma3n", "chameleon", "janus", "fast_vlm",
    "instructblip", "blip-2",
)  # fmt: skip
# … and with one tile for each row, where the tiles of a picture stand side by side.
_TILED = ("internvl",)
_TILES_APART = ("idefics3", "smolvlm")  # each tile is a run of its own; the last of a picture is marked
MARK = "<global-img>"
_SIZES = ("grid_thw", "grid_hws", "image_sizes")
_RAW = ("pixel_values", "pixel_values_videos", "input_features", "feature_attention_mask", "input_values")


class Sizes(NamedTuple):
    """What a call says of the sizes of its media: small tensors, and the shapes of large ones."""

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]


NO_SIZES = Sizes({}, {})


class Item(NamedTuple):
    """A picture, sound or video: where it is, as (row, column), and its tiles or frames likewise."""

    row: int
    places: Sequence[tuple[int, int]]
    parts: Sequence[Sequence[tuple[int, int]]] = ()


def sizes_of(call: Mapping[str, Any]) -> Sizes:
    """Return the sizes of the media in the arguments of a call."""
    there = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    return Sizes(
        {name: value for name, value in there.items() if name.endswith(_SIZES)},
        {name: tuple(value.shape) for name, value in there.items() if name in _RAW},
    )


class _Asked(NamedTuple):
    """What there is to tell the items of a medium apart."""

    medium: str
    every: Sequence[tuple[int, int]]  # (row, column) of each placeholder
    sizes: Sizes
    model_type: str
    marks: Bool[Tensor, "batch position"] | None

    @property
    def runs(self) -> list[list[tuple[int, int]]]:
        """Placeholders that stand side by side."""
        found = groupby(enumerate(self.every), key=lambda one: (one[1][0], one[1][1] - one[0]))
        return [[place for _, place in run] for _, run in found]

    @property
    def given(self) -> int | None:
        """The number of pictures, tiles, sounds or videos that the model is given; None where unknown."""
        names = {
            "image": ("pixel_values",),
            "video": ("pixel_values_videos",),
            "audio": ("feature_attention_mask", "input_features", "input_values"),
        }
        shapes = (self.sizes.shapes.get(name) for name in names[self.medium])
        return next((shape[0] for shape in shapes if shape), None)


def items(
    medium: str,
    places: Bool[Tensor, "batch position"],
    *,
    sizes: Sizes,
    config: Any,
    marks: Bool[Tensor, "batch position"] | None = None,
) -> list[Item]:
    """Return the items of a medium in a batch, in order, given where its placeholders are.

    `marks` are the tokens with which Idefics3 announces the last tile of a picture. Raises `LensError` where
    the sizes don't tell the items apart.
    """
    every = [(row, column) for row, column in places.nonzero().tolist()]
    if not every:
        return []
    asked = _Asked(medium, every, sizes, str(getattr(config, "model_type", "")), marks)
    for rule in _RULES:
        found = rule(asked)
        if found is not None:
            return found
    raise LensError(
        f"the sizes that the model is given do not tell its {medium}s apart, in {len(asked.runs)} runs of "
        f"placeholders. Use span={medium!r}, or token numbers"
    )


def _cut(every: Sequence[tuple[int, int]], counts: Sequence[int]) -> list[Sequence[tuple[int, int]]] | None:
    """Cut placeholders into pieces of these lengths; None where they don't fit, or cross from row to row."""
    if sum(counts) != len(every) or 0 in counts:
        return None
    ends = torch.tensor(counts).cumsum(0).tolist()
    pieces = [every[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return pieces if all(len({row for row, _ in piece}) == 1 for piece in pieces) else None


def _even_parts(
    places: Sequence[tuple[int, int]], count: int, *, rest: int = 0
) -> Sequence[Sequence[tuple[int, int]]]:
    """Cut an item into equal parts, but for up to `rest` tokens at its end; no parts where that fails."""
    each, over = divmod(len(places), count) if count else (0, 0)
    if not each or over > rest:
        return ()
    return [places[number * each : (number + 1) * each] for number in range(count)]


def _by_grid(asked: _Asked) -> list[Item] | None:
    """Tell items apart by their grids of patches, (item, time-height-width): a fixed share become tokens."""
    grid = next((t for n, t in asked.sizes.tensors.items() if n.startswith(f"{asked.medium}_grid_")), None)
    if grid is None:
        return None
    pieces = _in_proportion(asked.every, grid.prod(1).tolist())
    if pieces is None:
        return None
    times = grid[:, 0].tolist() if asked.medium == "video" and grid.shape[1] == 3 else [0] * len(pieces)
    return [
        Item(piece[0][0], piece, _even_parts(piece, time)) for piece, time in zip(pieces, times, strict=True)
    ]


def _by_marks(asked: _Asked) -> list[Item] | None:
    """Tell pictures apart by the mark in front of their last tile, where each tile is a run of its own."""
    if asked.model_type not in _TILES_APART or asked.medium != "image":
        return None
    if asked.marks is None:
        raise LensError(f"a lens without a processor does not know {MARK}, which ends the tiles of a picture")
    found: list[Item] = []
    tiles: list[Sequence[tuple[int, int]]] = []
    for run in asked.runs:
        tiles.append(run)
        row, column = run[0]
        if column and bool(asked.marks[row, column - 1]):
            found.append(Item(row, [place for tile in tiles for place in tile], tuple(tiles)))
            tiles = []
    return None if tiles else found


def _by_tiles(asked: _Asked) -> list[Item] | None:
    """Tell tiles apart where they stand side by side: `pixel_values` has a row for each."""
    if asked.model_type not in _TILED or asked.medium != "image" or not asked.given:
        return None
    each, over = divmod(len(asked.every), asked.given)
    if over or any(len(run) % each for run in asked.runs):
        return None
    return [Item(run[0][0], run, _even_parts(run, len(run) // each)) for run in asked.runs]


def _evenly(asked: _Asked) -> list[Item] | None:
    """Tell pictures apart where all have the same number of tokens."""
    if asked.model_type not in _EVEN or asked.medium != "image" or not asked.given:
        return None
    pieces = _in_proportion(asked.every, [1] * asked.given)
    return None if pieces is None else [Item(piece[0][0], piece) for piece in pieces]


def _by_sizes(asked: _Asked) -> list[Item] | None:
    """Tell pictures apart by their area: where all have one size, or each line is a run."""
    sizes = asked.sizes.tensors.get("image_sizes")
    if asked.medium != "image" or sizes is None or sizes.ndim != 2:
        return None
    pieces, starts = _in_proportion(asked.every, sizes.prod(1).tolist()), {run[0] for run in asked.runs}
    alike = len({tuple(size) for size in sizes.tolist()}) == 1  # then they have equally many tokens
    if pieces is None or not (alike or all(piece[0] in starts for piece in pieces)):
        return None
    return [Item(piece[0][0], piece) for piece in pieces]


def _by_runs(asked: _Asked) -> list[Item] | None:
    """Take each run of placeholders as an item where there are as many runs as the model is given items."""
    count, frames = asked.given, 0
    if asked.medium == "image":
        sizes = asked.sizes.tensors.get("image_sizes")
        count = None if sizes is None else len(sizes)
    if asked.medium == "video":
        shape = asked.sizes.shapes.get("pixel_values_videos", ())
        frames = shape[1] if len(shape) == 5 else 0
        count = count if frames else None
    if count is None or count != len(asked.runs):
        return None
    # A mark may stand behind the frames of a video.
    return [
        Item(run[0][0], run, _even_parts(run, frames, rest=1) if frames > 1 else ()) for run in asked.runs
    ]


def _in_proportion(
    every: Sequence[tuple[int, int]], areas: Sequence[int]
) -> list[Sequence[tuple[int, int]]] | None:
    """Cut placeholders in proportion to the areas of the items; None where that is not exact."""
    share, over = divmod(sum(areas), len(every))
    # Areas may be in pixels or patches, so that many of them make a token, or all the same number of tokens.
    if not over and share and not any(area % share for area in areas):
        return _cut(every, [area // share for area in areas])
    each, over = divmod(len(every), len(areas))
    return _cut(every, [each] * len(areas)) if not over and len(set(areas)) == 1 else None


_RULES: tuple[Callable[[_Asked], list[Item] | None], ...] = (
    _by_grid, _by_marks, _by_tiles, _evenly, _by_runs, _by_sizes,
)  # fmt: skip
