"""A checkpoint: sites over a store of named tensors, headers only until a site is read."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from affectlens import html, printable
from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.store import Store
from affectlens.errors import NoSuchSite, near, quoted
from affectlens.sites import (
    Laid,
    Site,
    Sites,
    Storage,
    Units,
    bare_name,
    heads,
    model_type,
    recognised,
    sections,
    ties,
    units,
)
from affectlens.sites.locating import in_order, placed

if TYPE_CHECKING:
    from torch import Tensor

    from affectlens.checkpoints.adapters.low_rank import LowRank

_FUSED = ("qkv_proj", "kv_proj", "gate_up_proj", "kv_b_proj")


@dataclass(frozen=True)
class AdapterChange:
    """The changes of an adapter to its base: sites saved whole, and sites changed by factors."""

    base: "Checkpoint"
    laid: Mapping[str, Laid]  # tensors that were saved whole
    whole: Mapping[Site, Storage]
    factors: Mapping[Site, "LowRank"]
    skipped: Mapping[str, tuple[str, int]]


class Checkpoint:
    """The weights of a model, addressed by site; made by `affectlens.open_checkpoint`.

    `like` is a checkpoint of the whole model if this one holds only a part: a lone `up_proj` is recognised
    only beside its gate. `change` is the change of an adapter. Raises `CheckpointError` if two tensors claim
    one site.

    >>> import affectlens as al
    >>> base = al.load_demo().base
    >>> up = base.sites.where(tower="language", role="up_proj", param="weight").expect(4)[0]
    >>> up, base.shape(up), base.dtype(up)
    (language.0.up_proj, (352, 128), 'bfloat16')
    >>> base.read(up.at(neuron=7)).shape
    torch.Size([1, 128])
    """

    def __init__(
        self, store: Store, *, like: "Checkpoint | None" = None, change: AdapterChange | None = None
    ) -> None:
        self.store, self.change, self.config = store, change, store.config
        self.tokenizer = store  # its folder has the tokenizer; of a live model, where it came from
        # For a live model: reads its weights from before any active interventions.
        self.untouched: Checkpoint = self
        # Sites that an adapter changes by a product of factors.
        self.factors: Mapping[Site, LowRank] = change.factors if change else {}
        # Stored tensors that can't be compared: why, and their number of elements.
        self.skipped = {**store.skipped, **(change.skipped if change else {})}
        if change is not None:
            self.laid: Mapping[str, Laid] = {**change.base.laid, **change.laid}
            self.storage: Mapping[Site, Storage] = in_order({**change.base.storage, **change.whole})
        else:
            shapes = {name: header.shape for name, header in store.headers.items()}
            config = store.config or (like.config if like else {})
            context = context_of(like) if like else {}
            self.laid, self.storage = placed(shapes, config, context=context, source=store.name)
        self.sites = Sites(self.storage)
        parts = sections(self.config, {site.tower for site in self.storage})
        self._heads = {tower: heads(part) for tower, part in parts.items()}

    def targeted(self, site: Site) -> bool:
        """Return whether tuning could change a site: any of a checkpoint, of an adapter only its own."""
        return self.change is None or site in self.change.factors or site in self.change.whole

    @property
    def parameters(self) -> int:
        """The number of elements, including skipped ones."""
        return sum(where.size for where in self.storage.values()) + sum(n for _, n in self.skipped.values())

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences on the model that a reader of any result should know."""
        kind, found = model_type(self.config), []
        if self.config.get("auto_map"):
            found.append("the model runs remote code, which is not executed here")
        elif "model_type" in self.config and not recognised(self.config):
            named = f"its model_type {quoted(kind)} is unknown" if kind else "its model_type is not a name"
            found.append(f"{named}: parameters are recognised by names and shapes alone")
        if "quantization_config" in self.config:
            found.append("the weights are quantized")
        return tuple(found)

    @property
    def ties(self) -> bool:
        """Whether output and input embedding are one matrix, unless the files hold two different ones."""
        own = any(site.role == "lm_head" for site in self.storage)
        shared = any(bare_name(name).endswith("lm_head.weight") for name in self.store.aliases)
        return shared or ties(self.config, whole=own)

    @property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding, and so is not stored."""
        return self.ties and all(site.role != "lm_head" for site in self.storage)

    def shape(self, site: Site) -> tuple[int, ...]:
        """Return the shape of a site: unfused, of one expert, a matrix as (out, in)."""
        return self.at(site).shape

    def dtype(self, site: Site) -> str:
        """Return the dtype of a site as torch names it: as stored, or float32 if factors change it."""
        if site.at() in self.factors:
            return "float32"
        return self.store.headers[self.at(site).tensor].dtype

    def read(self, site: Site, wanted: slice | None = None) -> "Tensor":
        """Read one site, or some of its rows; raises `NoSuchSite`."""
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
        """Return whether some rows of a site can be read without the others."""
        where = self.at(site)
        return bool(where.shape) and not where.transposed and where.expert is None and where.unit is None

    def span(self, site: Site) -> Span | None:
        """Return where the values of a site are stored; None if they are not stored in one run."""
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
        """Return the heads or neurons of a site; None if it has none, or their number is unknown.

        `site.at(head=3)` and `site.at(neuron=7)` can be read and changed like any site.
        """
        whole = site.at()
        every, grouped = self._heads[site.tower]
        return units(whole, self.shape(whole), heads=every, kv_heads=grouped)

    @property
    def identity(self) -> dict[str, Any]:
        """Facts that identify this checkpoint in the origin of a result; JSON-like, no absolute path."""
        return {
            "name": self.store.name,
            "format": self.store.format,
            "model_type": model_type(self.config) or "unknown",
            "parameters": self.parameters,
            "dtype": ", ".join(sorted({header.dtype for header in self.store.headers.values()})),
            **self.store.facts,
        }

    def at(self, site: Site) -> Storage:
        """Return where a site is stored; raises `NoSuchSite`."""
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
            there = f"{parts.count} {parts.kind}s" if parts else "no known heads or neurons"
            raise NoSuchSite(f"{site.at()} has {there}, so {site} does not exist")
        return whole.of(parts.cut(number))

    def __repr__(self) -> str:
        return "\n".join(f"{name:12} {printable.plain(value)}" for name, value in describe(self))

    def _repr_html_(self) -> str:
        return html.table(("", ""), describe(self), caption="Checkpoint")


def context_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a whole model, which help to recognise the tensors of a part of it."""
    found: dict[str, tuple[int, ...]] = {}
    for laid in checkpoint.laid.values():
        # A part may stack experts that the whole model stores one by one, so it brings its own shape.
        found.setdefault(laid.memory, ())
        found[laid.name] = laid.shape
    return found


def describe(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Return rows of (what, value) for people to read."""
    who = checkpoint.identity
    towers: Counter[str] = Counter()
    for site, storage in checkpoint.storage.items():
        towers[site.tower] += storage.size
    tied = "output embedding tied to the input embedding" if checkpoint.tied else "no"
    return [
        ("checkpoint", who["name"]),
        ("format", who["format"]),
        ("model type", who["model_type"]),
        ("parameters", f"{checkpoint.parameters:,} in {len(checkpoint.laid)} tensors"),
        *((f"· {tower}", f"{count:,}") for tower, count in towers.most_common()),
        ("language", _language(checkpoint)),
        ("dtype", who["dtype"]),
        ("tied", tied),
        ("header", who.get("header_sha256", "none: in memory")),
        *(("unusual", remark) for remark in unusual(checkpoint)),
        ("coverage", f"{coverage(checkpoint):.1%} of the parameters have a role"),
    ]


def coverage(checkpoint: Checkpoint) -> float:
    """Return the share of the parameters whose role is known."""
    named = sum(where.size for site, where in checkpoint.storage.items() if site.role != "other")
    return named / (checkpoint.parameters or 1)


def unusual(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield sentences on this checkpoint that a reader of a diff should know."""
    yield from checkpoint.remarks
    wrapped = [tensor for tensor in checkpoint.laid if bare_name(tensor) != tensor]
    if wrapped:
        yield f"names carry a wrapper's prefix or infix: {len(wrapped)} (first: {quoted(wrapped[0])})"
    fused = ((t, laid) for t, laid in checkpoint.laid.items() if laid.place.role in _FUSED)
    whole = [t for t, laid in fused if not laid.fused and laid.place.param != "bias"]
    if whole:
        reason = "are left whole because the config does not say how to split them"
        yield f"{len(whole)} fused tensors {reason} (first: {quoted(whole[0])})"
    turned = sum(laid.transposed for laid in checkpoint.laid.values())
    if turned:
        yield f"{turned} matrices are stored (in, out) and read as (out, in)"
    dtypes = {header.dtype for header in checkpoint.store.headers.values()}
    if len(dtypes) > 1:
        yield f"{len(dtypes)} dtypes"
    yield from left_out(checkpoint.skipped)
    yield from checkpoint.store.notes


def left_out(skipped: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    """Yield a sentence for each reason why stored tensors are skipped."""
    reasons: dict[str, list[str]] = {}
    for tensor, (why, _) in skipped.items():
        reasons.setdefault(why, []).append(tensor)
    for why, tensors in reasons.items():
        yield f"{len(tensors)} tensors are skipped: {why} (first: {quoted(tensors[0])})"


def _language(checkpoint: Checkpoint) -> str:
    sites = [site for site in checkpoint.storage if site.tower == "language"]
    layers = {(site.stack, site.layer) for site in sites if site.layer is not None}
    mlp = (s for s in sites if s.role in ("gate_proj", "fc1") and s.param == "weight")
    first = next((s for s in mlp if len(checkpoint.shape(s)) >= 2), None)
    if first is None:
        return f"{len(layers)} layers, no known MLP"
    inner, hidden = checkpoint.shape(first)[:2]
    kind = "gated MLP" if first.role == "gate_proj" else "plain MLP"
    experts = {site.expert for site in sites if site.expert is not None}
    extra = f", {len(experts)} experts" if experts else ""
    return f"{len(layers)} layers, hidden {hidden}, {kind} {inner}{extra}"
