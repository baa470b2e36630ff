"""Rewrite the activations or the attention mask that pass a place.

activations ──▶ features of the point ──▶ rewrite(values, moment) ──▶ new values at the chosen positions
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from affectlens.errors import LensError
from affectlens.lens.hooks.activations import spread
from affectlens.lens.hooks.layouts import layout_of
from affectlens.lens.hooks.masking import mask_as_keyword, mask_of, of_heads
from affectlens.lens.hooks.moments import Moments
from affectlens.lens.hooks.places import Place
from affectlens.lens.hooks.positions import Moment
from affectlens.lens.hooks.recomputing import NOT_REPEATED, checkpointed, recomputes
from affectlens.lens.inputs.placeholders import MEDIA
from affectlens.lens.live import UNSEEN
from affectlens.lens.restoring import refuse_copy
from affectlens.sites import Point

# From the values at a point, (batch, position, feature) where it has positions, and the moment, to new values
# of the same shape; the same tensor object means 'no change'. A mask is (batch, 1, query, key).
Rewrite = Callable[[Tensor, Moment | None], Tensor]


@runtime_checkable
class Beginning(Protocol):
    """A rewrite with a state that it resets at the start of each forward pass of the model."""

    def begin(self) -> None:
        """Reset the state: a new forward pass has begun."""
        ...


@dataclass(eq=False)
class Hook:
    """A rewrite at a place, callable as a hook of torch.

    `reached` counts the calls in which the point's span had at least one position.
    """

    point: Point
    place: Place
    rewrite: Rewrite
    moments: Moments
    records: bool = False  # look at each pass once, also where no position of the span passes
    say: Callable[[str], None] | None = None  # makes a remark where placeholders of media pass
    reached: int = 0
    _pass: int = 0

    __reduce_ex__ = refuse_copy

    def __post_init__(self) -> None:
        if self.point.span is not None and not self.place.positional:
            raise LensError(
                f"{self.point!r}: the {self.point.site.tower} tower has no text positions; leave out the span"
            )

    @property
    def side(self) -> str:
        """When the hook runs: before the module ("input") or after it ("output")."""
        return "output" if self.place.side == "output" else "input"

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], *output: Any) -> Any:
        """Return the new output or the new input of a module; None where nothing changes."""
        if UNSEEN.get() or self.moments.ignores or (self.records and recomputes()):
            return None
        if not self.records and ((self.moments.graded and checkpointed()) or recomputes()):
            raise LensError(f"{self.point!r}: {NOT_REPEATED}")
        if self.moments.passes != self._pass:
            self._pass = self.moments.passes
            counting: object = self.rewrite
            if isinstance(counting, Beginning):
                counting.begin()
        if self.place.side == "mask":
            args, kwargs = mask_as_keyword(module, args, kwargs=kwargs)
            passing = kwargs.get("hidden_states", *args[:1])
            moment = self._moment(passing, getattr(passing, "shape", ()))
            mask, moment = mask_of(module, kwargs, moment=moment, encoder=self.moments.encoder)
            new = of_heads(mask, self.place, rewrite=lambda some: self.rewrite(some, moment))
            self.reached += new is not mask
            return None if new is mask else (args, {**kwargs, "attention_mask": new})
        if output:
            return self._within(output[0], module)
        if args:
            new = self._within(args[0], module)
            return None if new is None else ((new, *args[1:]), kwargs)
        for name, value in kwargs.items():  # some modules are called with keywords alone
            if isinstance(value, Tensor) and value.is_floating_point():
                new = self._within(value, module)
                return None if new is None else (args, {**kwargs, name: new})
        raise LensError(f"{self.point!r}: the input of this module has no floating-point tensor")

    def _within(self, value: Any, module: nn.Module) -> Any:
        """Rewrite the first tensor of a value, which may be nested in tuples; None where nothing changes."""
        if isinstance(value, Tensor):
            new = self._changed(value, module)
            return None if new is value else new
        if isinstance(value, tuple | list) and value:
            first = self._within(value[0], module)
            return None if first is None else type(value)((first, *value[1:]))
        raise LensError(f"{self.point!r}: a {type(value).__name__} passes there, not a tensor")

    def _changed(self, tensor: Tensor, module: nn.Module) -> Tensor:
        """Rewrite a tensor in the layout (batch, position, …, feature), and restore its own layout."""
        if not tensor.is_floating_point():
            raise LensError(f"{self.point!r}: {tensor.dtype} passes there, not a floating-point tensor")
        layout = layout_of(tensor, self.place, module=module, moment=self._moment)
        shaped = tensor if layout.there is None else layout.there(tensor)
        self._refuse_other_streams(shaped, layout.moment)
        new = self._features(shaped, layout.moment)
        return tensor if new is shaped else layout.back(new)

    def _refuse_other_streams(self, shaped: Tensor, moment: Moment | None) -> None:
        """Raise `LensError` for several residual streams in a layout that is not known."""
        if self.point.kind != "residual" or shaped.ndim != 4 or moment is None:
            return
        if tuple(shaped.shape[:2]) != (len(moment.own), moment.length):
            raise LensError(
                f"{self.point!r}: several residual streams pass, in shape {tuple(shaped.shape)}, and the "
                f"first dimension is not the batch; choose another point"
            )

    def _moment(self, passing: object, shape: Sequence[int]) -> Moment | None:
        """Return the moment of a tensor: of its last positions alone, where the model dropped the others."""
        if not self.place.positional or not isinstance(passing, Tensor):
            return None
        moment = self.moments.now(self.place.stack, shape)
        if moment is None or passing.ndim != 3 or len(passing) != len(moment.own):
            return moment
        return moment.tail(passing.shape[1]) if passing.shape[1] < moment.length else moment

    def _remark_placeholders(self, moment: Moment, say: Callable[[str], None]) -> None:
        for medium in MEDIA:
            with suppress(LensError):  # a medium that this model does not take
                if bool((moment.chosen(self.point.span) & moment.chosen(medium)).any()):
                    say(
                        f"{self.point.site!r}@{self.point.kind}: what passes there at the positions of "
                        f"{medium} is a placeholder, which the model then replaces. span={medium!r} selects "
                        f"what enters the first layer instead"
                    )

    def _features(self, tensor: Tensor, moment: Moment | None) -> Tensor:
        """Rewrite the features that belong to the point."""
        wanted = self.place.features
        if wanted is None:
            return self._chosen(tensor, moment)
        index = slice(wanted.start, wanted.stop, wanted.step) if isinstance(wanted, range) else list(wanted)
        values = tensor[..., index]
        new = self._chosen(values, moment)
        if new is values:
            return tensor
        whole = tensor.clone()
        whole[..., index] = new
        return whole

    def _chosen(self, values: Tensor, moment: Moment | None) -> Tensor:
        """Rewrite the values at the positions of the span, and keep the others."""
        chosen = None
        if self.point.span is not None:
            if moment is None or values.shape[:2] != (len(moment.own), moment.length):
                raise LensError(
                    f"{self.point!r}: activations of shape {tuple(values.shape)} have no token positions; "
                    f"leave out the span"
                )
            chosen = moment.chosen(self.point.span)
            if not self.records and not moment.some(self.point.span):
                return values  # not counted in `reached`, so that the block can warn of an idle point
        self.reached += 1
        if self.say is not None and moment is not None:
            self._remark_placeholders(moment, self.say)
        new = self.rewrite(values, moment)
        if new is values:
            return values
        if new.shape != values.shape:
            raise LensError(
                f"{self.point!r}: the activations have shape {tuple(values.shape)}, "
                f"the new values {tuple(new.shape)}"
            )
        new = new.to(device=values.device, dtype=values.dtype)
        return new if chosen is None else torch.where(spread(chosen, values), new, values)
