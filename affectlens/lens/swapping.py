"""From new values of sites to new tensors of parameters: fused ones slice by slice, adapted ones merged.

    site → new values ──▶ parameter → new tensor (the caller's own tensor, where it is the whole parameter)

An adapted matrix computes with its base weights and its factors. To give it new weights, they are written
into the base and the factors are zeroed: it then computes with the new weights alone. They are right for the
state that its adapters have now, so a guard refuses to run it in another one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.adapters.attached import adapter_state, is_adapter_layer
from affectlens.checkpoints.adapters.low_rank import LowRank
from affectlens.checkpoints.slicing import put
from affectlens.errors import LensError
from affectlens.lens.hooks.places import module_name, parameter_name, place_of
from affectlens.lens.live import Live, refuse_unlike
from affectlens.lens.restoring import Swaps, refuse_copy
from affectlens.sites import Point, Site

Swap = tuple[Any, str, Any]  # owner, attribute, new value


def swapped(lens: Live, edits: Mapping[Site, Tensor]) -> list[Swap]:
    """Return the attributes to set so that sites get new values; sets none. Raises `LensError`."""
    live, parameters = lens.checkpoint, lens.parameters
    for site in edits:
        refuse_unlike(site, parameters[parameter_name(live.at(site))])
        live.store.read(live.at(site).tensor)  # raises where an adapter's effect is unknown
    adapted = _adapted(lens, edits)
    new: dict[str, Tensor] = dict(_merged(lens, adapted))
    given: set[str] = set()  # new tensors that belong to the caller: never write into them
    for site, value in edits.items():
        where = live.at(site)
        if tuple(value.shape) != where.shape:
            raise LensError(f"{site} has shape {where.shape}, the new values {tuple(value.shape)}")
        name = parameter_name(where)
        old = parameters[name]
        value = value.to(device=old.device, dtype=old.dtype)
        if where.size == old.numel() and not where.transposed:
            new[name] = value.reshape(old.shape)
            given.add(name)
        else:
            if name not in new or name in given:
                new[name] = new.get(name, old.data).clone()
                given.discard(name)
            put(new[name], where, value=value)
    found: list[Swap] = [(parameters[name], "data", value) for name, value in new.items()]
    return found + _silenced(lens, adapted)


def _adapted(lens: Live, edits: Mapping[Site, Tensor]) -> dict[str, nn.Module]:
    """Return the adapted modules that hold a site to change, by name of the parameter."""
    live, found = lens.checkpoint, {}
    for site in edits:
        whole = site.at()
        if ".trainable_tokens_" in parameter_name(live.at(whole)):
            raise LensError(f"{site} has an adapter for rows of single tokens; merge the adapter first")
        if whole not in live.factors:
            continue
        if live.factors[whole].decomposed:
            raise LensError(
                f"{site} has a DoRA adapter, which would rescale the new values; merge the adapter first"
            )
        if live.factors[whole].expert is not None:
            raise LensError(f"{site} has an adapter for all experts at once; merge the adapter first")
        where = live.at(whole)
        module = lens.model.get_submodule(module_name(where))
        if any(getattr(module, "lora_bias", {}).values()):
            raise LensError(f"{site} has an adapter with a bias (lora_bias); merge the adapter first")
        found[parameter_name(where)] = module
    return found


def _merged(lens: Live, adapted: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield adapted parameters with their factors merged, so that unchanged parts keep their effect."""
    live = lens.checkpoint
    for name in adapted:
        whole = lens.parameters[name].data.clone()
        for site, where in live.storage.items():
            if parameter_name(where) == name:
                put(whole, where, value=live.read(site).to(device=whole.device, dtype=whole.dtype))
        yield name, whole


def _silenced(lens: Live, adapted: Mapping[str, nn.Module]) -> list[Swap]:
    """Switch the factors of adapted modules off; PEFT's are zeroed, so that the adapter stays as it is."""
    found: list[Swap] = []
    hooks = {n: [h for h in m._forward_hooks.values() if isinstance(h, Beside)] for n, m in adapted.items()}
    for name, module in adapted.items():
        found += [(hook, "off", True) for hook in hooks[name]]
        if hooks[name]:
            continue
        found += _zeroed(module)
    gone = {name for name, own in hooks.items() if own}
    return [*found, (lens, "shown", _less(lens.checkpoint, gone))] if gone else found


def _zeroed(layer: nn.Module) -> Iterator[Swap]:
    """Yield the swaps after which a layer of PEFT adds nothing to its weights."""
    for name, parameter in layer.named_parameters():
        if ".lora_B." in f".{name}" or ".lora_embedding_B." in f".{name}":
            yield parameter, "data", torch.zeros_like(parameter.data)


def _less(live: Checkpoint, names: set[str]) -> Checkpoint:
    """Return the live checkpoint without the factors of some parameters, which now contain them."""
    assert live.change is not None
    kept = {site: one for site, one in live.factors.items() if parameter_name(live.at(site)) not in names}
    found = Checkpoint(live.store, change=replace(live.change, factors=kept))
    found.untouched = live.untouched
    return found


class Unswitched:
    """Hook that raises `LensError` where a layer of PEFT computes in another state than it has now."""

    def __init__(self, layer: Any, name: str) -> None:
        self._state, self._name = adapter_state(layer), name

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: object) -> None:
        if kwargs.get("adapter_names") is not None:
            raise LensError(
                f"adapter_names= gives the rows of a batch different weights, but a block changed those of "
                f"{self._name} for all rows. Activate one adapter with set_adapter before the block"
            )
        if adapter_state(module) != self._state:
            raise LensError(
                f"the adapter of {self._name} was switched, rescaled or merged inside a block that changed "
                f"its weights. Do it before the block: with model.disable_adapter(), lens.intervene(…): …"
            )

    __reduce_ex__ = refuse_copy


def guard(swaps: Swaps, lens: Live, *, edits: Iterable[Site]) -> None:
    """Refuse to run changed layers of PEFT in another state of their adapters, until the swaps are undone."""
    names = dict.fromkeys(module_name(lens.checkpoint.at(site)) for site in edits)
    for name in names:
        layer = lens.model.get_submodule(name)
        if is_adapter_layer(layer):
            swaps.hook(layer, Unswitched(layer, name), side="output")
            if (merged := vars(layer).get("merged_adapters")) is not None:
                # A merge inside the block is undone with the weights that it changed.
                swaps.swap(layer, "merged_adapters", value=list(merged))
                # PEFT merges and unmerges in place, perhaps into the donor's own memory: by zeros, then.
                for owner, attribute, value in _zeroed(layer) if merged or layer.disable_adapters else ():
                    swaps.swap(owner, attribute, value=value)


class Beside:
    """Hook that adds scale · B·A·x to a matrix's output unless `off`; `on` while a block uses it."""

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, features: Any) -> None:
        self._a, self._b, self._scale, self._features = a, b, scale, features
        self.on = self.off = False

    __reduce_ex__ = refuse_copy

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if self.off:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        more = nn.functional.linear(nn.functional.linear(x.to(self._a.dtype), self._a), self._b) * self._scale
        if self._features is None:
            return (output + more).to(output.dtype)
        new = output.clone()
        new[..., list(self._features)] += more.to(output.dtype)
        return new


def beside(lens: Live, site: Site, *, factors: LowRank) -> tuple[nn.Module, Beside]:
    """Return the hook that applies a site's factors, and the module to hook."""
    place = place_of(Point(site), model=lens.model, live=lens.checkpoint)
    like = lens.parameters[parameter_name(lens.checkpoint.at(site))]
    a, b = (factors.store.read(name).to(like.device) for name in (factors.pair.a, factors.pair.b))
    if factors.where.cut is not None:
        b = factors.factors.b.to(device=like.device, dtype=b.dtype)
    assert factors.scale is not None
    found = Beside(a, b, scale=factors.scale, features=place.features)
    return lens.model.get_submodule(place.module), found


def fits_beside(lens: Live, site: Site, *, factors: LowRank) -> bool:
    """Return whether a low-rank change can be added to the output of its matrix: a plain one, whole rows."""
    if not factors.plain or factors.scale is None:
        return False
    where = lens.checkpoint.at(site)
    refuse_unlike(site, lens.parameters[parameter_name(where)])
    cut = where.cut
    rows = cut is None or (cut.dim == 0) != where.transposed
    plain = isinstance(lens.model.get_submodule(module_name(where)), nn.Linear)
    return plain and rows and where.expert is None
