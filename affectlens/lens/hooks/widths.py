"""The number of features that pass a point, known before anything runs."""

from typing import Any

from torch import nn

from affectlens.errors import LensError
from affectlens.lens.hooks.places import place_of
from affectlens.lens.live import Live, config_of
from affectlens.sites import Point


def width_of(point: Point, lens: Live) -> int | None:
    """Return how many features pass a point; None where the module does not tell it."""
    place = place_of(point, model=lens.model, live=lens.checkpoint)
    if place.features is not None:
        return len(place.features)
    entering = point.site.role == "embed_tokens" and place.side == "input"  # what enters the first layer
    if point.kind == "residual" or entering:
        hidden = _hidden(lens.model) if point.site.tower == "language" else None
        return None if hidden is None else hidden * place.streams
    module: Any = lens.model.get_submodule(place.module)
    if isinstance(module, nn.Linear):
        return module.out_features if place.side == "output" else module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if place.side == "output" else None
    weight = getattr(module, "weight", None)
    return len(weight) if weight is not None and weight.ndim == 1 else None


def refuse_width(point: Point, lens: Live, *, width: int, what: str) -> None:
    """Raise `LensError` where values of another width would be put in at a point."""
    there = width_of(point, lens)
    if there is not None and there != width:
        raise LensError(f"{point!r}: {there:,} features pass there, but {what} has {width:,}")


def _hidden(model: nn.Module) -> int | None:
    config = config_of(model)
    texts = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = getattr(texts, "hidden_size", None)
    return found if type(found) is int else None
