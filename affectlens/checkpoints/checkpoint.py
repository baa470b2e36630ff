"""A checkpoint: sites over a store of named tensors, headers only until a site is read."""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from affectlens import html
from affectlens.errors import NoSuchSite, near
from affectlens.sites import Site, Sites, Storage, locate

if TYPE_CHECKING:
    from torch import Tensor


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

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor as stored, or some of its rows."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies the content: header hash, bytes, files, revision."""
        ...


class Checkpoint:
    """Address the tensors of a store by canonical site.

    Made by `affectlens.open_checkpoint`. Raises `CheckpointError` when two tensors claim one site.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        shapes = {name: header.shape for name, header in store.headers.items()}
        self.storage: dict[Site, Storage] = locate(shapes, store.name, config=store.config)

    @cached_property
    def sites(self) -> Sites:
        """Every site, sorted."""
        return Sites(self.storage)

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json`, empty where there is none."""
        return self.store.config

    @property
    def parameters(self) -> int:
        """The number of stored elements."""
        return sum(storage.size for storage in self.storage.values())

    @property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding and so is not stored."""
        text = self.config.get("text_config")
        text = text if isinstance(text, dict) else {}
        flag = self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return bool(flag) and not any(site.role == "lm_head" for site in self.storage)

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape of a site, unfused."""
        return self._at(site).shape

    def dtype(self, site: Site) -> str:
        """The stored dtype of a site, as torch names it."""
        return self.store.headers[self._at(site).tensor].dtype

    def read(self, site: Site) -> "Tensor":
        """Read one site; raises `NoSuchSite` when the checkpoint has none such."""
        from affectlens.checkpoints.slicing import rows, take

        where = self._at(site)
        return take(self.store.read(where.tensor, rows(where)), where)

    @property
    def identity(self) -> dict[str, Any]:
        """What this is, for the origin of a result; JSON-like, no absolute path."""
        return {
            "name": self.store.name,
            "format": self.store.format,
            "model_type": str(self.config.get("model_type", "unknown")),
            "parameters": self.parameters,
            "dtype": ", ".join(sorted({header.dtype for header in self.store.headers.values()})),
            **self.store.facts,
        }

    def _at(self, site: Site) -> Storage:
        try:
            return self.storage[site]
        except KeyError:
            there = near(site, self.storage)
            raise NoSuchSite(f"{self.store.name} has no site {site}. Sites: {there}") from None

    def __repr__(self) -> str:
        return "\n".join(f"{name:12} {html.plain(value)}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        return html.table(("", ""), self._lines(), caption="Checkpoint")

    def _lines(self) -> list[tuple[str, str]]:
        who = self.identity
        towers: Counter[str] = Counter()
        for site, storage in self.storage.items():
            towers[site.tower] += storage.size
        named = sum(s.size for site, s in self.storage.items() if site.role != "other")
        shape = _language_shape(self.sites, self.storage)
        total = self.parameters or 1
        return [
            ("checkpoint", who["name"]),
            ("format", who["format"]),
            ("model type", who["model_type"]),
            ("parameters", f"{self.parameters:,} in {len(self.store.headers)} tensors"),
            *((f"· {tower}", f"{count:,}") for tower, count in towers.most_common()),
            ("language", shape),
            ("dtype", who["dtype"]),
            ("tied", "output embedding tied to the input embedding" if self.tied else "no"),
            ("header", who.get("header_sha256", "none: in memory")),
            ("coverage", f"{named / total:.1%} of the parameters have a role"),
        ]


def _language_shape(sites: Sites, storage: Mapping[Site, Storage]) -> str:
    layers = {site.layer for site in sites if site.tower == "language" and site.layer is not None}
    gate = next((s for s in sites if s.tower == "language" and s.role == "gate_proj"), None)
    if gate is None:
        return f"{len(layers)} layers, no gate_proj"
    inner, hidden = storage[gate].shape[:2]
    return f"{len(layers)} layers, hidden {hidden}, gated MLP {inner}"
