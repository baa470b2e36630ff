"""Another model that is run on whatever this one is given, so that its activations can be put here."""

from typing import Any

import torch
from torch import Tensor

from affectlens.errors import LensError
from affectlens.lens import Activations, Lens, Moment, Recording
from affectlens.lens.running import answering, encodes, inner
from affectlens.sites import Points


class Following:
    """Run `lens` once at each moment of another model's passes, with a cache of its own in `generate`."""

    def __init__(self, lens: Lens, points: Points) -> None:
        # All positions: those of a span are chosen where they are put.
        self._lens, self._points = lens, points
        self._places = Points({point: type(point)(point.site, point.kind) for point in points}.values())
        self._call: object = None
        self._cache: Any = None
        self._passed: dict[Any, Tensor] = {}

    def at(self, point: Any, moment: Moment) -> Tensor:
        """What passes a point of the other model at this moment, (batch, position, feature)."""
        if moment.call is not self._call:
            self._run(moment)
            self._call = moment.call
        return self._passed[type(point)(point.site, point.kind)]

    def _reorder_with(self, cache: Any) -> None:
        """Let a search that exchanges the rows of this model's cache exchange those of the other's too."""
        if cache is None or not hasattr(cache, "reorder_cache"):
            return
        exchange = cache.reorder_cache

        def both(rows: Tensor) -> None:
            exchange(rows)
            if self._cache is not None:
                self._cache.reorder_cache(rows)

        cache.reorder_cache = both

    def _run(self, moment: Moment) -> None:
        kwargs = moment.call
        if moment.blind:
            raise LensError(moment.blind)
        alone = "decoder_input_ids" not in kwargs or kwargs.get("encoder_outputs") is not None
        if encodes(self._lens.model) and alone:
            raise LensError("an encoder and a decoder are run one by one here; patch from a recording")
        if kwargs.get("mm_encoder_outputs") is not None:
            raise LensError(
                "generate has encoded pictures and sounds by this model before, so the other one can't see "
                "them; patch from a recording of what the other generates, or compare logits"
            )
        if moment.start and (moment.begins or self._cache is None):
            raise LensError("the other model has not seen what is in the cache, so it can't go on from it")
        if moment.begins:
            self._cache = None
            self._reorder_with(kwargs.get("past_key_values"))
        own = {**kwargs, "past_key_values": self._cache} if "past_key_values" in kwargs else dict(kwargs)
        with torch.no_grad(), Recording(self._lens, self._places) as recording:
            out = inner(answering(self._lens.model))(**own)
        self._cache = getattr(out, "past_key_values", None)
        for point in self._places:
            passed = recording[point]
            assert isinstance(passed, Activations)
            self._passed[point] = passed.values
