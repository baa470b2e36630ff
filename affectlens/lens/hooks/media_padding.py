"""Tell which rows and positions of a vision or audio tower are padding, so that none is recorded.

each module around a point ── its arguments ──▶ masks ──▶ the mask of the tensor that passes the point
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.hooks.media_masks import Lengths, arguments, fitted, masks, silent_ends
from affectlens.lens.hooks.places import Place
from affectlens.lens.hooks.recomputing import recomputes
from affectlens.lens.live import UNSEEN
from affectlens.lens.restoring import Swaps
from affectlens.sites import Point

_MEDIA = (("audio", re.compile(r"audio|speech|sound")), ("vision", re.compile(r"vision|visual|image")))
_LENGTHS = "_get_feat_extract_output_lengths"  # transformers' name for a tower's own count of positions


class MediaPadding:
    """Notes the calls of the modules around some places while the model runs."""

    def __init__(self, model: nn.Module, places: Iterable[Place]) -> None:
        self._model = model
        self._names = sorted({name for place in places for name in _around(place.module)})
        self._given: dict[str, dict[str, Tensor]] = {}
        self._lengths: dict[str, Lengths] = {
            name: getattr(module, _LENGTHS)
            for name, module in (model.named_modules() if self._names else ())
            if hasattr(module, _LENGTHS)
        }

    def follow(self, swaps: Swaps) -> None:
        """Install the hooks that note the calls, until the swaps are undone."""
        for name in self._names:
            module = self._model.get_submodule(name)
            swaps.hook(module, partial(self._enter, name), side="enter")
            swaps.hook(module, partial(self._leave, name), side="output")

    def own(self, point: Point, place: Place, *, values: Tensor) -> Tensor | None:
        """Return which entries of the first dimensions of values, (row, …, feature), are no padding.

        None where all are. Raises `LensError` where there is padding, and it is unknown where.
        """
        found, padded = None, False
        lengths = self._lengths_for(place.module)
        for mask in self._masks(point, place.module):
            fits = fitted(mask, values.shape[:-1], lengths=lengths)
            if fits is None:
                padded |= not bool(mask.all())
            elif found is None or found.ndim == fits.ndim:
                found = fits if found is None else found & fits
        if found is not None:
            return None if bool(found.all()) else found.to(values.device)
        if padded:
            raise LensError(
                f"{point!r}: the batch has padded pictures or sounds, and which part of activations of shape "
                f"{tuple(values.shape)} is padding is unknown. Run pictures and sounds of one size together, "
                f"or choose a point in the layers of the tower"
            )
        return None

    def _masks(self, point: Point, module: str) -> Iterator[Tensor]:
        """Yield the masks of the calls around a module that are about the medium of a point."""
        medium = point.site.tower
        if medium not in ("audio", "vision"):
            medium = next((name for name, pattern in _MEDIA if pattern.search(module)), "")
        calls = [(name, self._given[name]) for name in _around(module) if name in self._given]
        found = [one for name, given in calls for one in masks(self._model.get_submodule(name), given)]
        if not any(about in ("audio", "") for about, _ in found):
            found += [one for _, given in calls for one in silent_ends(given)]
        yield from (mask for about, mask in found if not about or not medium or about == medium)

    def _lengths_for(self, module: str) -> Lengths | None:
        """Return how a tower counts its positions: the one around a module, else the first in the model."""
        nearest = [self._lengths[name] for name in _around(module) if name in self._lengths]
        return next(iter([*nearest[::-1], *self._lengths.values()]), None)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not (UNSEEN.get() or recomputes()):
            self._given[name] = arguments(module, args, kwargs=kwargs)

    def _leave(self, name: str, *_: object) -> None:
        self._given.pop(name, None)


def _around(module: str) -> list[str]:
    """Return the names of the modules around a module, and its own, from the outermost.

    >>> _around("model.layers")
    ['', 'model', 'model.layers']
    """
    parts = module.split(".")
    return ["", *(".".join(parts[:n]) for n in range(1, len(parts) + 1))]
