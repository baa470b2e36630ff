"""Plain records for the names in a torch file: storages, tensors, and the settings of a run.

Each function takes the arguments of the torch function that it replaces, and computes no values.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from affectlens.errors import CheckpointError
from affectlens.printable import plain

CONVERT = "Convert it to safetensors where you trust it"
CONSOLIDATE = "Consolidate DeepSpeed's shards with zero_to_fp32.py"
# Bytes of an element.
WIDTHS: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex128": 16, "complex64": 8, "complex32": 4,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
    "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1, "quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1,
}  # fmt: skip
_NUMBERS = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8",
}  # fmt: skip
_QUANTIZED = {
    "QUInt8": "quint8", "QInt8": "qint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"
}  # fmt: skip
_STORAGES: Mapping[str, str] = {
    **{f"torch.{kind}Storage": dtype for kind, dtype in (_NUMBERS | _QUANTIZED).items()},
    **{f"torch.cuda.{kind}Storage": dtype for kind, dtype in _NUMBERS.items()},
    "torch.storage.UntypedStorage": "uint8",
}
_SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric")
_DIMENSIONS = 64  # torch's own limit
_ARGUMENTS = 16  # of a call; torch's have ten at most
PLAIN = (str, int, float, bytes, type(None))  # types of keys that are kept
# Objects that are refused, by a part of their name: why, and what to do.
_KNOWN = (
    ("deepspeed.", "holds DeepSpeed's own objects", CONSOLIDATE),
    (
        "TrainingArguments",
        "holds no model weights: settings of the training only",
        "Name the file of the weights",
    ),
    ("omegaconf.", "refused: it holds an OmegaConf object, which would run code", CONVERT),
)


class Named(NamedTuple):
    """A class or function that a pickle names, as its full name."""

    name: str


class Odd:
    """A replacement for a key that is not text or a number, such as a tuple."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __str__(self) -> str:
        return f"a {self.kind}"


class Settings:
    """An `argparse.Namespace`: attributes, and no code of its own."""

    attributes: object = None


class TorchStorage(NamedTuple):
    """A storage of tensor elements: its key within the file, and its dtype."""

    key: str
    dtype: str


class Stored(NamedTuple):
    """A tensor: its place in a storage, in elements."""

    storage: TorchStorage | None  # None if it was saved without values
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    kind: str = ""  # why its bytes are not its values, e.g. "sparse"; empty if they are

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def storage(identity: object) -> TorchStorage:
    """Return the storage that a persistent id names: `("storage", class, key, device, elements)`.

    Raises `ValueError` for any other id.
    """
    # Before torch 1.6 a sixth part described a view of a storage; views ended with torch 0.2, so it is None.
    match identity:
        case ("storage", Named(name=name), str(key), _, int()) if name in _STORAGES:
            return TorchStorage(key, _STORAGES[name])
        case ("storage", Named(name=name), str(key), _, int(), None) if name in _STORAGES:
            return TorchStorage(key, _STORAGES[name])
    raise ValueError("not a torch storage")


def refused(path: str, name: str) -> CheckpointError:
    """Return the error for a pickle that could run code, or has instructions that torch never writes."""
    shown = plain(name)
    for known, reason, fix in _KNOWN:
        if known in name:
            return CheckpointError(path, f"{reason} ({shown})", fix=fix)
    what = f"a whole module or another object ({shown})" if name else "objects or instructions"
    reason = f"refused: it holds {what} beside tensors, and opening that could run code"
    return CheckpointError(path, reason, fix=CONVERT)


def called(function: Named, arguments: tuple[Any, ...]) -> Any:
    """Return the record for a call in a pickle; raises `LookupError` for a name without one."""
    if len(arguments) > _ARGUMENTS:
        raise ValueError("too many arguments")
    return _CALLS[function.name](*arguments)


def _tensor(held: TorchStorage, offset: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    """Stand for `_rebuild_tensor` and `_rebuild_tensor_v2`, which adds `requires_grad, hooks, metadata`."""
    return _stored(held, offset, shape, strides, held.dtype, _kind(rest[2:]))


def _of_dtype(held: TorchStorage, offset: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    """Stand for `_rebuild_tensor_v3`, over a storage of bytes: `requires_grad, hooks, dtype, metadata`."""
    return _stored(held, offset, shape, strides, _dtype(rest[2]), _kind(rest[3:]))


def _stored(
    held: TorchStorage | None,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    kind: str,
) -> Stored:
    if not len(shape) == len(strides) <= _DIMENSIONS or not isinstance(held, TorchStorage | None):
        raise ValueError("not a tensor")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and abs(n) < 2**63 for n in numbers) or min(shape, default=0) < 0:
        raise ValueError("invalid offset, shape or strides")
    # Torch multiplies in the order of the dimensions, so it can overflow before it reaches a zero.
    if math.prod(filter(None, shape)) >= 2**63 or dtype not in WIDTHS:
        raise ValueError("invalid size or dtype")
    return Stored(held, offset, tuple(shape), tuple(strides), dtype, kind)


def _kind(metadata: tuple[Any, ...]) -> str:
    known = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    return "conjugated or negated" if known.get("conj") or known.get("neg") else ""


def _dtype(named: Named) -> str:
    return named.name.removeprefix("torch.")


def _quantized(held: TorchStorage, offset: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    return _stored(held, offset, shape, strides, held.dtype, f"quantized (torch.{held.dtype})")


def _sparse(layout: Any, data: tuple[Any, ...]) -> Stored:
    """Stand for `_rebuild_sparse_tensor`: indices, values, shape, and in newer files `is_coalesced`."""
    shape = next(part for part in data[:4] if type(part) is tuple)
    values = next(part for part in data[:4] if type(part) is Stored)
    return _stored(values.storage, 0, shape, shape, values.dtype, "sparse")


def _without_values(dtype: Named, shape: Any, strides: Any, *rest: Any) -> Stored:
    return _stored(None, 0, shape, strides, _dtype(dtype), "")


def _nested(buffer: Stored, *rest: Any) -> Stored:
    return buffer._replace(kind="nested")


def _typed(function: Named, kind: Named, arguments: tuple[Any, ...], state: Any) -> Stored:
    """Stand for `_rebuild_from_type_v2`: a tensor with attributes, or of a subclass."""
    found: Stored = called(function, arguments)
    return found if kind.name in _CLASSES else found._replace(kind=kind.name)


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    if isinstance(pairs, dict):
        return pairs
    found = {key: value for key, value in pairs if isinstance(key, PLAIN)}
    if pairs:
        pairs.clear()  # pairs are from Python 2; kept, a short file could copy a long list again and again
    return found


def _first(*parts: Any) -> Any:
    return parts[0] if parts else ()


_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_values,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "argparse.Namespace": Settings,
    # The values of these are not needed, but a set may hold tensors.
    "builtins.set": _first,
    "builtins.bytearray": _first,
    "builtins.complex": _first,
    "_codecs.encode": _first,
    "torch.Size": _first,
    "torch.device": _first,
    "torch.serialization._get_layout": _first,
}
ALLOWED = frozenset((*_CALLS, *_STORAGES, *_CLASSES, *(f"torch.{name}" for name in (*WIDTHS, *_SCHEMES))))
