"""A checkpoint: sites over a store of named tensors, headers only until a site is read."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from affectlens import html
from affectlens.checkpoints.bytes import Span
from affectlens.errors import CheckpointError, NoSuchSite, near, quoted
from affectlens.sites import (
    Laid,
    Site,
    Sites,
    Storage,
    Units,
    bare_name,
    heads,
    lay_out,
    model_type,
    recognised,
    sections,
    sites_of,
    units,
)

if TYPE_CHECKING:
    from torch import Tensor

    from affectlens.checkpoints.adapters.lowrank import LowRank


Shapes = Mapping[str, tuple[int, ...]]
# What tells saves of one model apart, and nothing of its layout.
_ABOUT_THE_SAVE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # as torch names it, e.g. "bfloat16"


class Store(Protocol):
    """Named tensors somewhere: in safetensors files, in a live module, in a mapping."""

    name: str  # how a person would call it; never an absolute path
    source: str  # what opens it again: a path or hub id, empty for what is only in memory
    format: str
    headers: Mapping[str, Header]
    config: Mapping[str, Any]
    notes: tuple[str, ...]  # what was found beside the weights, in sentences

    @property
    def skipped(self) -> Mapping[str, tuple[str, int]]:
        """What is stored but not to be had: why, and its elements."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that are stored as another's bytes."""
        ...

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor, or some of its rows: as stored, or in float32 where that was packed."""
        ...

    def span(self, tensor: str) -> Span | None:
        """Where the bytes of a tensor are; None where they are not its values, or are not to be had."""
        ...

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies the content: header hash, bytes, files, revision."""
        ...


@dataclass(frozen=True)
class Change:
    """What an adapter makes of its base: sites from elsewhere, and sites that factors change."""

    base: "Checkpoint"
    laid: Mapping[str, Laid]  # of the tensors that were saved whole
    whole: Mapping[Site, Storage]
    factors: Mapping[Site, "LowRank"]
    skipped: Mapping[str, tuple[str, int]]


class Checkpoint:
    """Address the tensors of a store by canonical site.

    Made by `affectlens.open_checkpoint`. `like` is a checkpoint of the whole model where this one holds
    a part of it: a lone `up_proj` shows what it is only beside the gate that was not saved. `change` is
    an adapter's. Raises `CheckpointError` when two tensors claim one site.
    """

    def __init__(
        self, store: Store, *, like: "Checkpoint | None" = None, change: Change | None = None
    ) -> None:
        self.store, self.change, self.config = store, change, store.config
        # Of a live model while an intervention holds: the same as it was before.
        self.untouched: Checkpoint = self
        # The sites that an adapter changes by a product of factors.
        self.factors: Mapping[Site, LowRank] = change.factors if change else {}
        # What is stored and can't be compared: why, and its number of elements.
        self.skipped = {**store.skipped, **(change.skipped if change else {})}
        if change is not None:
            self.laid: Mapping[str, Laid] = {**change.base.laid, **change.laid}
            together = {**change.base.storage, **change.whole}
            self.storage: Mapping[Site, Storage] = dict(sorted(together.items(), key=lambda item: item[0]))
        else:
            shapes = {name: header.shape for name, header in store.headers.items()}
            config = store.config or (like.config if like else {})
            context = context_of(like) if like else {}
            self.laid, self.storage = _placed(store.name, shapes, config, context=context)
        self.sites = Sites(self.storage)
        towers = {site.tower for site in self.storage}
        self._heads = {tower: heads(part) for tower, part in sections(self.config, towers).items()}

    def targeted(self, site: Site) -> bool:
        """Whether tuning could have changed a site: any of a whole checkpoint, of an adapter its own."""
        return self.change is None or site in self.change.factors or site in self.change.whole

    @property
    def parameters(self) -> int:
        """The number of elements, skipped ones among them."""
        return sum(where.size for where in self.storage.values()) + sum(n for _, n in self.skipped.values())

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of any result should know of the model itself."""
        kind, found = model_type(self.config), []
        if self.config.get("auto_map"):
            found.append("the model runs remote code, which is not executed here")
        elif "model_type" in self.config and not recognised(self.config):
            named = f"its model_type, {quoted(kind)}, is unknown" if kind else "its model_type is none"
            found.append(f"{named}: names and shapes alone say what its parameters are")
        if "quantization_config" in self.config:
            found.append("the weights are quantized")
        return tuple(found)

    @property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding and so is not stored."""
        text = self.config.get("text_config")
        text = text if isinstance(text, dict) else {}
        flag = self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        shared = any(bare_name(name).endswith("lm_head.weight") for name in self.store.aliases)
        return bool(flag or shared) and not any(site.role == "lm_head" for site in self.storage)

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape of a site: unfused, one expert, a matrix as (out, in)."""
        return self.at(site).shape

    def dtype(self, site: Site) -> str:
        """The dtype of a site as torch names it: as stored, or float32 where factors change it."""
        if site.at() in self.factors:
            return "float32"
        return self.store.headers[self.at(site).tensor].dtype

    def read(self, site: Site, wanted: slice | None = None) -> "Tensor":
        """Read one site, or some of its rows; raises `NoSuchSite` when the checkpoint has none such."""
        from affectlens.checkpoints.slicing import rows, some, take

        where = self.at(site)
        whole = site.at()
        if whole in self.factors:
            return self._changed(site, wanted)
        if wanted is None:
            return take(self.store.read(where.tensor, rows(where)), where)
        return some(self.store, where, wanted=wanted)

    def _changed(self, site: Site, wanted: slice | None) -> "Tensor":
        assert self.change is not None
        unit = self.at(site).unit
        if unit is not None:
            whole = self._changed(site.at(), None)
            return whole.narrow(unit.dim, unit.start, unit.stop - unit.start)
        base = self.change.base.read(site, wanted)
        return self.change.factors[site].applied(base, wanted or slice(None))

    def by_rows(self, site: Site) -> bool:
        """Whether some rows of a site can be read without the others."""
        where = self.at(site)
        return bool(where.shape) and not where.transposed and where.expert is None and where.unit is None

    def span(self, site: Site) -> Span | None:
        """Where the bytes of a site are, as stored; None where they are not one run of its values."""
        from affectlens.checkpoints.slicing import contiguous

        if site.at() in self.factors:
            return None
        where = self.at(site)
        header, whole = self.store.headers[where.tensor], self.store.span(where.tensor)
        run = contiguous(where, header)
        count = math.prod(header.shape)
        if whole is None or run is None or not count:
            return None
        width = (whole.stop - whole.start) // count
        return whole.part(run[0] * width, run[1] * width)

    def units(self, site: Site) -> Units | None:
        """The heads or neurons that a site is made of; None where it has none, or their number is unknown.

        `site.at(head=3)` and `site.at(neuron=7)` are read and changed like any site.
        """
        whole = site.at()
        every, grouped = self._heads[site.tower]
        return units(whole, self.shape(whole), heads=every, kv_heads=grouped)

    @property
    def identity(self) -> dict[str, Any]:
        """What this is, for the origin of a result; JSON-like, no absolute path."""
        return {
            "name": self.store.name,
            "format": self.store.format,
            "model_type": model_type(self.config) or "unknown",
            "parameters": self.parameters,
            "dtype": ", ".join(sorted({header.dtype for header in self.store.headers.values()})),
            **self.store.facts,
        }

    def at(self, site: Site) -> Storage:
        """Where a site lies; raises `NoSuchSite`."""
        found = self.storage.get(site) or self._unit(site)
        if found is None:
            there = near(site, self.storage)
            raise NoSuchSite(f"{self.store.name} has no site {site}. Sites: {there}")
        return found

    def _unit(self, site: Site) -> Storage | None:
        numbers = {"head": site.head, "neuron": site.neuron}
        whole = self.storage.get(site.at())
        if whole is None or site == site.at():
            return None
        parts = self.units(site)
        number = numbers.get(parts.kind) if parts else None
        if parts is None or type(number) is not int or not 0 <= number < parts.count:
            there = f"{parts.count} {parts.kind}s" if parts else "no heads or neurons that are known"
            raise NoSuchSite(f"{site.at()} has {there}, so {site} is not one")
        return whole.of(parts.cut(number))

    def __repr__(self) -> str:
        return "\n".join(f"{name:12} {html.plain(value)}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        return html.table(("", ""), self._lines(), caption="Checkpoint")

    def _lines(self) -> list[tuple[str, str]]:
        from affectlens.checkpoints.describing import describe

        return describe(self)


def context_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole model, by which a part of it is known for what it is."""
    found: dict[str, tuple[int, ...]] = {}
    for laid in checkpoint.laid.values():
        # A part may have experts stacked that the whole has one by one; the shape is its own to say.
        found.setdefault(laid.memory, ())
        found[laid.name] = laid.shape
    return found


def _placed(
    source: str, shapes: Shapes, config: Mapping[str, Any], *, context: Shapes
) -> tuple[Mapping[str, Laid], Mapping[Site, Storage]]:
    known = {key: value for key, value in config.items() if key not in _ABOUT_THE_SAVE}
    try:
        text = json.dumps(known, default=str)
        laid, storage = _layout(tuple(shapes.items()), text, tuple(context.items()))
        return dict(laid), dict(storage)
    except CheckpointError as error:
        raise CheckpointError(source, error.reason, key=error.key) from None


@lru_cache(maxsize=4)
def _layout(
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    config: str,
    context: tuple[tuple[str, tuple[int, ...]], ...],
) -> tuple[Mapping[str, Laid], Mapping[Site, Storage]]:
    """Base and tuned mostly have the same names: what they say is worked out once."""
    laid = lay_out(dict(shapes), json.loads(config), context=dict(context))
    return laid, sites_of(laid)
