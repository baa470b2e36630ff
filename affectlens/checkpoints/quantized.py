"""A store that shows quantised weights under their ordinary names and unpacks them when they are read.

    opening ──▶ Store ── unpacked ──▶ QuantizedStore ── read ──▶ float32

A quantised checkpoint stores a weight as small numbers, and scales beside them. If names, shapes and dtypes
allow only one reading, the weight is shown with its unquantised shape, so it has its usual site and can be
compared. Tensors that could be read in several ways are skipped with the reason, never guessed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.eight_bit import scaled, scheme_of
from affectlens.checkpoints.four_bit import Found, four_bit, mxfp4
from affectlens.checkpoints.store import Header, Store

if TYPE_CHECKING:
    from torch import Tensor

_FIX = "compare the unquantised checkpoint"
_FIXES = {"MLX": "unpack it: mlx_lm.convert --hf-path FOLDER --mlx-path OUT --dequantize"}
# Tools with a packing of their own, recognised by the tensors that a module then has.
_FOREIGN = (
    ("MLX", {"weight", "scales", "biases"}),
    ("EXL2", {"q_weight", "q_scale"}),
    ("EXL3", {"trellis"}),
    ("VPTQ", {"centroids", "indices"}),
    ("HIGGS", {"weight", "scales", "tables"}),
    ("QuIP#", {"Qidxs"}),
    ("SpQR", {"dense_weights"}),
    ("Marlin", {"B", "s"}),
    ("GPTQ", {"qweight", "scales", "g_idx"}),
    ("AWQ or GPTQ", {"qweight", "scales"}),
    ("compressed-tensors", {"weight_packed"}),
    ("compressed-tensors (sparse)", {"compressed", "bitmask"}),
    ("NVFP4", {"weight", "weight_scale_2"}),
    ("HQQ", {"W_q"}),
    ("torchao", {"_weight_qdata"}),
    ("quanto", {"_data", "_scale"}),
    ("AQLM", {"codes", "codebooks", "scales"}),
)
# Scales of activations or of the key-value cache.
_ACTIVATION = r"(^|[._])(input_scale|input_scale_ub|activation_scale|qscale_act)$|\.(output|[kv])_scale$"


class QuantizedStore:
    """Show the dequantised weights of a store beside its ordinary tensors.

    `stored_as` names the stored tensors of each dequantised one; `skipped` has the reason for every tensor
    that is not shown, and its number of elements.
    """

    def __init__(self, store: Store, found: Mapping[str, Found], *, skipped: Mapping[str, str]) -> None:
        self.name, self.source, self.format = store.name, store.source, store.format
        self.config, self.aliases, self.notes = store.config, store.aliases, store.notes
        self.inner = store
        self._packed = {name: f.packed for name, f in found.items() if not isinstance(f.packed, str)}
        self.stored_as: dict[str, tuple[str, ...]] = {name: found[name].parts for name in self._packed}
        self.skipped: Mapping[str, tuple[str, int]] = {
            **store.skipped,
            **{tensor: (why, math.prod(store.headers[tensor].shape)) for tensor, why in skipped.items()},
        }
        used = {part for parts in self.stored_as.values() for part in parts} | skipped.keys()
        self.headers: Mapping[str, Header] = {
            **{tensor: header for tensor, header in store.headers.items() if tensor not in used},
            **{name: Header(packed.shape, packed.dtype) for name, packed in self._packed.items()},
        }

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor, or some of its rows: a dequantised one in float32, any other as stored."""
        packed = self._packed.get(tensor)
        if packed is None:
            return self.inner.read(tensor, rows)
        first, last, _ = (rows or slice(None)).indices(packed.shape[0])
        return packed.read(self.inner, first=first, last=max(first, last))

    def by_rows(self, tensor: str) -> bool:
        """Return whether some rows can be read alone; those of a dequantised tensor can."""
        return tensor in self._packed or self.inner.by_rows(tensor)

    def span(self, tensor: str) -> Span | None:
        """Return where the values of a tensor are stored; None for a dequantised one."""
        return None if tensor in self._packed else self.inner.span(tensor)

    def origin(self, tensor: str) -> Span | None:
        """Return where the opened files store a tensor; None for a dequantised one."""
        return None if tensor in self._packed else self.inner.origin(tensor)

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        self.inner.check()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts that identify the stored content."""
        return self.inner.facts


def unpacked(store: Store) -> Store:
    """Return a store that shows quantised weights dequantised; one without any is returned as it is."""
    scheme = scheme_of(store)
    # Tensors of another tool's packing are never read, even if a known format would fit their shapes.
    skipped = dict(_foreign(store.headers))
    found: dict[str, Found] = {}
    for tensor in store.headers:
        if tensor in skipped:
            continue
        one = mxfp4(store, tensor) or four_bit(store, tensor) or scaled(store, tensor, scheme=scheme)
        if one is not None and isinstance(one.packed, str):
            skipped |= dict.fromkeys(one.parts, f"{one.packed}; {_FIX}")
        elif one is not None:
            found[one.name] = one
    if not found and not skipped:
        return store
    used = {part for one in found.values() for part in one.parts}
    for tensor in store.headers:
        if re.search(_ACTIVATION, tensor):
            skipped.setdefault(tensor, "activation scale")
    return QuantizedStore(store, found, skipped={t: why for t, why in skipped.items() if t not in used})


def _foreign(headers: Mapping[str, Header]) -> Iterator[tuple[str, str]]:
    modules: dict[str, set[str]] = {}
    for tensor in headers:
        module, _, leaf = tensor.rpartition(".")
        modules.setdefault(module, set()).add(leaf)
    for module, leaves in modules.items():
        kind = next((kind for kind, marks in _FOREIGN if marks <= leaves), "")
        for leaf in sorted(leaves - {"bias"}) if kind else ():
            yield f"{module}.{leaf}" if module else leaf, f"packed by {kind}; {_FIXES.get(kind, _FIX)}"
