"""Open any source that a user names: a folder, a file, a hub id, a live module, or an open checkpoint."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from affectlens.checkpoints.adapters.adapter import adapted
from affectlens.checkpoints.adapters.factor_names import FACTOR, Sorted, sort
from affectlens.checkpoints.adapters.lone_adapter import Adapter
from affectlens.checkpoints.adapters.recipes import preset_of, recipe
from affectlens.checkpoints.checkpoint import Checkpoint, describe
from affectlens.checkpoints.folders import ADAPTER, adapter_config, open_store
from affectlens.checkpoints.meta_format import MetaStore, as_transformers, in_meta_format, lora_config
from affectlens.checkpoints.quantized import unpacked
from affectlens.checkpoints.store import JoinedStore, Store
from affectlens.checkpoints.weight_files import adapters_among
from affectlens.errors import CheckpointError
from affectlens.sites import Site, drawn, nodes, record

if TYPE_CHECKING:
    import torch

Source = Union[str, Path, Checkpoint, "torch.nn.Module"]
# The hub's own rules: for other names its client would raise an error of its own.
_HUB_ID = re.compile(r"(?![^@]*(?:--|\.\.|\.git(?:@|$)))\b[\w.-]+\b/\b[\w.-]{1,96}\b(@[\w./-]+)?", re.ASCII)
_CONFIGS = (ADAPTER, "config.json", "pytorch_model.bin.index.json")


def open_checkpoint(
    source: Source,
    *,
    base: Source | None = None,
    preset: str | None = None,
    alpha: float | None = None,
) -> Checkpoint:
    """Open a checkpoint; reads headers only, and weights when a site is read.

    `source` is a folder or file of safetensors or torch weights (`.bin`, `.pth`, `.pt`), a PEFT adapter, a
    file of bare trainables, a hub id (`owner/name` or `owner/name@revision`, read by ranges without a
    download), a live `nn.Module`, or a `Checkpoint`, which is returned as it is. An adapter needs the `base`
    that it was trained on, and is read as effective weights. If no file says LoRA's alpha, pass `alpha`, or
    the `preset` of a known model (`affectlens.checkpoints.adapters.recipes.PRESETS`). Raises
    `CheckpointError`.

    >>> import affectlens as al
    >>> folder = al.load_demo().tuned.store.source
    >>> tuned = al.open_checkpoint(folder)
    >>> tuned.parameters, len(tuned.sites.where(role="gate_proj"))
    (3081568, 4)
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | Path):
        store, config = stored(source)
        store = unpacked(store)
        if in_meta_format(store):
            base = None if base is None else open_checkpoint(base)
            store = as_transformers(store, base)
        return _opened(store, config, base=base, preset=preset, alpha=alpha)
    # A module can exist only if torch is imported already; importing it just to ask would be slow.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.nn.Module):
        from affectlens.checkpoints.adapters.attached import adapter_layers, opened
        from affectlens.checkpoints.memory import store_of

        store, layers = store_of(source), dict(adapter_layers(source))
        # A live module gets two views: with the interventions that are active now, and from before them.
        live, live.untouched = (
            opened(one, layers) if layers else _opened(one, {}, base=base, preset=preset, alpha=alpha)
            for one in (store, store.before())
        )
        return live
    raise CheckpointError(type(source).__name__, "is not a path, hub id, Checkpoint or nn.Module")


@dataclass(frozen=True)
class Look:
    """A checkpoint or a lone adapter, described without reading weights."""

    source: Checkpoint | Adapter

    def lines(self) -> list[tuple[str, str]]:
        """Return rows of (what, value) for people to read."""
        return self.source.lines() if isinstance(self.source, Adapter) else describe(self.source)

    def tree(self) -> Iterator[str]:
        """Yield the tree of sites by tower, stack and role; for a checkpoint with parameter counts."""
        size: Callable[[Site], int] | None = None
        if isinstance(self.source, Checkpoint):
            storage = self.source.storage
            size = lambda site: storage[site].size  # noqa: E731  a def would be longer
        return drawn(nodes(self.source.sites, size))

    def records(self) -> list[dict[str, Any]]:
        """Return one JSON-like record for each stored tensor."""
        if isinstance(self.source, Adapter):
            return self.source.records()
        headers = self.source.store.headers
        return [record(t, laid, dtype=headers[t].dtype) for t, laid in self.source.laid.items()]


def look(source: Source) -> Look:
    """Describe a folder, file, hub id, adapter or live module; raises `CheckpointError`."""
    if isinstance(source, str | Path):
        store, config = stored(source)
        store = unpacked(store)
        if config or any(FACTOR.search(name) for name in store.headers):
            return Look(Adapter(store, config))
        return Look(Checkpoint(as_transformers(store, None) if in_meta_format(store) else store))
    return Look(open_checkpoint(source))


def opens_again(
    side: Checkpoint, base: Checkpoint, *, alpha: float | None = None, preset: str | None = None
) -> bool:
    """Return whether opening an adapter's source again, as a worker does, gives the same weights."""
    if side.change is None or side.change.base.store.source == side.store.source:
        return True
    root = base.change.base if base.change else base
    if side is base or side.change.base.store.source != root.store.source:
        return False
    # A worker doesn't know an alpha or preset that was given only here: then the scales differ.
    again = open_checkpoint(side.store.source, base=base, alpha=alpha, preset=preset)
    return all(again.factors[site].scale == known.scale for site, known in side.factors.items())


def named_on_hub(source: str | Path) -> str:
    """Return a source as a hub id; raises `CheckpointError` if it can't be one."""
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(source, "there is no such file or folder")
    return str(source)


def local(source: str | Path) -> str:
    """Return a source as a path on this machine: `~` is the home folder."""
    return os.path.expanduser(source)  # noqa: PTH111  for any string, where Path.expanduser raises


def stored(source: str | Path) -> tuple[Store, Mapping[str, Any]]:
    """Open the store of a path or hub id; returns it with its adapter config, empty for a whole model."""
    path = local(source)
    if path and os.path.lexists(path):
        return _here(Path(path), os.path.realpath(path))
    from affectlens.checkpoints.hub.downloading import download
    from affectlens.checkpoints.hub.listing import cached, listed, open_hub

    hub_id = named_on_hub(source)
    listing = listed(hub_id)
    if isinstance(listing, Path):
        return _here(listing, hub_id)
    # If the cache has this commit, the files on disk are faster than ranges.
    here = cached(listing.source)
    if here is not None:
        return _here(here, hub_id)
    weights = [name for name in listing.files if name.endswith(".safetensors") and "/" not in name]
    # Adapters are small, and torch files have no header to read by ranges: both are downloaded.
    if ADAPTER in listing.files and not any(name.startswith("model") for name in weights):
        beside = adapters_among(name for name in listing.files if "/" not in name)
        wanted = [name for name in listing.files if name in beside or name in _CONFIGS]
    elif not weights:
        configs = [name for name in listing.files if name in _CONFIGS]
        wanted = [*_torch_files(hub_id, listing.files), *configs]
    else:
        return open_hub(hub_id, listing=listing), {}
    return _here(download(listing, wanted, revision=hub_id.partition("@")[2]), hub_id)


def _opened(
    store: Store,
    config: Mapping[str, Any],
    *,
    base: Source | None,
    preset: str | None,
    alpha: float | None,
) -> Checkpoint:
    if not config and not any(FACTOR.search(name) for name in store.headers):
        preset_of(store.name, preset)  # raises for a misspelt preset, even if there are no factors to scale
        return Checkpoint(store)
    if isinstance(store, MetaStore):
        config = config or lora_config(store.inner.config)
    rule = recipe(store.name, config, preset=preset, alpha=alpha)
    found = sort(store.headers, store.name, bare=rule.bare)
    # A store with a model of its own is read over that, even if `base` is given.
    if base is not None and not _holds_base(found):
        return adapted(store, open_checkpoint(base), recipe=rule)
    own, factors = _parted(store, found)
    return adapted(factors, own, recipe=rule)


def _torch_files(hub_id: str, files: Iterable[str]) -> list[str]:
    """Return the torch files to fetch of a repository; raises `CheckpointError` if the choice is unclear."""
    found = [name for name in files if name.endswith((".bin", ".pth", ".pt")) and "/" not in name]
    whole = [name for name in found if name.startswith("pytorch_model")]
    if not whole and len(found) != 1:
        there = ", ".join(sorted(found or files)[:6])
        reason = f"{len(found)} torch files and no index, so it is unclear which one to open"
        raise CheckpointError(
            hub_id, reason, fix=f"Download one with `hf download` and open it. In it: {there}"
        )
    return whole or found


def _here(path: Path, source: str) -> tuple[Store, Mapping[str, Any]]:
    return open_store(path, source), adapter_config(path)


def _holds_base(found: Sorted) -> bool:
    """Return whether a store also holds the model that its factors change, like a saved live model."""
    # PEFT also writes the `base_layer` of a trained embedding into the adapter; that alone is not a model.
    stored = {name.replace(".base_layer.", ".") for name in found.whole}
    rest = (name for name, owner in found.whole.items() if name == owner and ".base_layer." not in name)
    return bool(found.pairs) and found.pairs.keys() <= stored and any(rest)


def _parted(store: Store, found: Sorted) -> tuple[Checkpoint, Store]:
    """Split a store of a model and its adapter into these two; raises `CheckpointError` without a model."""
    if not _holds_base(found):
        reason = "an adapter can't be read without the base that it was trained on"
        raise CheckpointError(store.name, reason, fix="Pass base=, or diff it as the tuned side")
    saved = {name for name, owner in found.whole.items() if owner != name}
    copies = [name for name in found.rest if ".original_module." in name]
    own = {name: (store, name) for name in (*(found.whole.keys() - saved), *copies)}
    rest = {name: (store, name) for name in store.headers if name not in own}
    base = Checkpoint(JoinedStore(store, own, config=store.config))
    return base, JoinedStore(store, rest, config=store.config)
