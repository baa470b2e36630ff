"""What the weights of a torch file are wrapped in: a zip archive, and mappings within mappings.

    file ── open_archive ──▶ outline (the pickle, no values) ── torch ──▶ mappings ── unwrap ──▶ tensors

The archive's directory is read here, once: torch is handed an outline of it in memory, with the pickle
and an empty member for each storage, so that it can neither read values nor understand the directory
otherwise than we do.
"""

import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from affectlens.checkpoints.bytes import LocalFile, Span
from affectlens.checkpoints.impostors import AGAIN, refuse_impostors
from affectlens.errors import CheckpointError
from affectlens.html import plain

CONVERT = "Convert it to safetensors where you trust it"
_CONSOLIDATE = "Consolidate DeepSpeed's shards with zero_to_fp32.py"
_CUT = "the zip archive is cut short or broken"
_PICKLE_LIMIT = 256_000_000  # bytes; the names and shapes of a model need a thousandth of it
_ENVELOPES = ("state_dict", "model", "module", "model_state_dict", "net", "params")
_DEEPEST = 8  # envelopes; a mapping may hold itself
_PLAIN_TYPES = ("Tensor", "Parameter", "Buffer", "FakeTensor")

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of files of before torch 1.6

_IMPOSTORS = (
    (rb".{6}\0\0\{", "this is a safetensors file", "Rename it to .safetensors"),
    (rb"\x80[\x00-\x05]", "this is a plain pickle, not a file of torch.save", CONVERT),
)

# What is known of objects that are refused, by their names.
_KNOWN = (
    ("deepspeed.", "holds DeepSpeed's own objects", _CONSOLIDATE),
    (
        "TrainingArguments",
        "holds no model weights: settings of the training only",
        "Name the file of the weights",
    ),
    ("omegaconf.", "refused, since it holds an OmegaConf object, which would run code", CONVERT),
)


class Archive(NamedTuple):
    """The pickle of a torch file as a file of its own, and the storages by their place in that."""

    outline: BytesIO
    storages: dict[int, Span]


class Contents(NamedTuple):
    """The model's tensors, and what else there is."""

    tensors: dict[str, Tensor]
    skipped: dict[str, tuple[str, int]]  # those whose bytes are not their values: why, and elements
    ignored: dict[str, tuple[int, int]]  # key path → number of tensors, number of elements


def recognised(file: LocalFile) -> Literal["zip", "legacy"]:
    """Say how a torch file is written; raises `CheckpointError` for what is none, saying what it is."""
    first = bytes(Span(file, 0, min(32, file.size)).read())
    if "zero_pp_rank_" in file.path.name:
        raise CheckpointError(file.name, "this is a shard of DeepSpeed ZeRO", fix=_CONSOLIDATE)
    if first.startswith(b"PK\x03\x04"):
        return "zip"
    if first.startswith(_LEGACY):
        return "legacy"
    refuse_impostors(file.name, first, others=_IMPOSTORS)
    shown = f"begins with {first[:8]!r}" if first else "is empty"
    raise CheckpointError(file.name, f"is no torch file: it {shown}", fix=AGAIN)


def open_archive(file: LocalFile) -> Archive:
    """Check the zip directory of a torch file; of the values nothing is read.

    Raises `CheckpointError` for compressed, encrypted, doubled, overlapping or missing members.
    """
    try:
        with zipfile.ZipFile(file.path) as opened:
            members = _members(file, opened.infolist())
            root = _root(file, members)
            pickled = opened.read(f"{root}/data.pkl")
    except CheckpointError:
        raise
    except Exception:  # zipfile raises errors of many kinds, some not its own
        raise CheckpointError(file.name, _CUT, fix=AGAIN) from None
    if _record(members, f"{root}/byteorder") not in (b"", b"little"):
        raise CheckpointError(file.name, "was saved on a big-endian machine", fix="Convert it there")
    return _outline(pickled, members, root)


def _record(members: Mapping[str, Span], name: str) -> bytes:
    """One of torch's notes in an archive, a word long; empty where it is not there."""
    span = members.get(name)
    return bytes(span.part(0, min(16, span.stop - span.start)).read()) if span else b""


def _members(file: LocalFile, listed: list[zipfile.ZipInfo]) -> dict[str, Span]:
    """Where the bytes of each member are; no byte belongs to two."""
    found: dict[str, Span] = {}
    for info in listed:
        if info.flag_bits & 1:
            raise CheckpointError(file.name, "encrypted members", fix="Unpack and save it again")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            reason = "compressed members; garbage values would be read"
            raise CheckpointError(file.name, reason, fix="Load and save it again with torch.save")
        if info.filename in found:
            raise CheckpointError(file.name, f"two members named {plain(info.filename)!r}")
        found[info.filename] = _member(file, info)
    end = 0
    for name, span in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if span.start < end:
            raise CheckpointError(file.name, f"the member {plain(name)!r} overlaps another")
        end = span.stop
    return found


def _member(file: LocalFile, info: zipfile.ZipInfo) -> Span:
    # The directory doesn't say where the bytes begin: that takes the lengths in the member's own header.
    header, data = info.header_offset, info.header_offset + 30
    if header < 0 or data > file.size:
        raise CheckpointError(file.name, _CUT, fix=AGAIN)
    magic, method, name, extra = struct.unpack("<4s4xH16xHH", Span(file, header, data).read())
    start = data + name + extra
    if magic != b"PK\x03\x04" or method or start + info.file_size > file.size:
        raise CheckpointError(file.name, _CUT, fix=AGAIN)
    return Span(file, start, start + info.file_size)


def _root(file: LocalFile, members: Mapping[str, Span]) -> str:
    """The folder that all is in, within the archive."""
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if any(f"{root}/constants.pkl" in members for root in roots):
        raise CheckpointError(file.name, "this is a TorchScript program", fix="Save its state_dict instead")
    if len(roots) != 1:
        raise CheckpointError(
            file.name, f"this is a zip archive with {len(roots) or 'no'} data.pkl, no torch file"
        )
    pickled = members[f"{roots[0]}/data.pkl"]
    if pickled.stop - pickled.start > _PICKLE_LIMIT:
        raise CheckpointError(file.name, f"its data.pkl is larger than {_PICKLE_LIMIT:,} bytes")
    return roots[0]


def _outline(pickled: bytes, members: Mapping[str, Span], root: str) -> Archive:
    outline, storages = BytesIO(), {}
    with zipfile.ZipFile(outline, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", _record(members, f"{root}/version"))
        for member, span in members.items():
            if member.startswith(f"{root}/data/"):
                name = f"a{member[len(root) :]}"
                archive.writestr(name, b"")
                storages[archive.getinfo(name).header_offset + 30 + len(name.encode())] = span
    outline.seek(0)
    return Archive(outline, storages)


def refused(path: str, message: str) -> CheckpointError:
    """The error for a pickle that torch's restricted reader refuses; `message` is what torch said."""
    # Torch's own message tells how to disable the guard; of it only the name is passed on.
    match = re.search(r"GLOBAL ([^\s;]+)", message)
    name = plain(match[1]) if match else ""
    for known, reason, fix in _KNOWN:
        if known in name:
            return CheckpointError(path, f"{reason} ({name})", fix=fix)
    what = f"a whole module or another object ({name})" if name else "objects or instructions"
    reason = f"refused: it holds {what} beside tensors, and opening that could run code"
    return CheckpointError(path, reason, fix=CONVERT)


def unwrap(loaded: object, path: str) -> Contents:
    """Find the model's tensors in what was saved with them; the rest is counted.

    Raises `CheckpointError` where there are none, saying what there is instead.
    """
    ignored: dict[str, tuple[int, int]] = {}
    above = ""
    for _ in range(_DEEPEST):
        inner = _envelope(loaded)
        if inner is None:
            break
        assert isinstance(loaded, Mapping)
        ignored |= {_path(above, key): _count(value) for key, value in loaded.items() if key != inner}
        above, loaded = _path(above, inner), loaded[inner]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(path, f"holds a {type(loaded).__name__}, not tensors by their names")
    named = {
        key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    ignored |= {_path(above, key): _count(value) for key, value in loaded.items() if key not in named}
    skipped = {key: (kind, value.numel()) for key, value in named.items() if (kind := _kind(value))}
    tensors = {key: value for key, value in named.items() if key not in skipped}
    if not tensors:
        raise _without_model(path, loaded, skipped)
    if 2 * sum(not tensor.numel() for tensor in tensors.values()) > len(tensors):
        reason = "most of its tensors are empty, as in a shard of DeepSpeed ZeRO-3"
        raise CheckpointError(path, reason, fix=_CONSOLIDATE)
    return Contents(tensors, skipped, ignored)


def _envelope(loaded: object) -> Any:
    """The key that the model is under; None where it is here, or nowhere."""
    if not isinstance(loaded, Mapping):
        return None
    here = sum(value.numel() for key, value in loaded.items() if isinstance(key, str) and _usable(value))
    for key in _ENVELOPES:
        # A counter of steps may lie beside the model, but not the model beside a smaller one.
        if _holds_model(loaded.get(key), _DEEPEST) and _count(loaded[key])[1] >= here:
            return key
    return None


def _holds_model(value: object, depth: int) -> bool:
    if not isinstance(value, Mapping) or not depth:
        return False
    if any(isinstance(key, str) and _usable(inner) for key, inner in value.items()):
        return True
    return any(_holds_model(value.get(key), depth - 1) for key in _ENVELOPES)


def _count(value: object) -> tuple[int, int]:
    """Tensors and elements within; each once, however often it is referred to."""
    seen: set[int] = set()
    todo, tensors, elements = [value], 0, 0
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            tensors, elements = tensors + 1, elements + item.numel()
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif isinstance(item, Namespace):
            todo += vars(item).values()
    return tensors, elements


def _kind(value: object) -> str:
    """What keeps the bytes of a tensor from being its values; empty where they are."""
    if not isinstance(value, Tensor):
        return "no tensor"
    if type(value).__name__ not in _PLAIN_TYPES:
        return type(value).__name__
    if value.is_quantized or value.is_nested:
        return f"quantized ({value.dtype})" if value.is_quantized else "nested"
    if value.layout is not torch.strided:
        return "sparse"
    return "conjugated or negated" if value.is_conj() or value.is_neg() else ""


def _usable(value: object) -> bool:
    return not _kind(value)


def _path(above: str, key: object) -> str:
    return f"{above}.{key}" if above else str(key)


def _without_model(
    path: str, loaded: Mapping[Any, object], skipped: Mapping[str, tuple[str, int]]
) -> CheckpointError:
    if skipped:
        first, (kind, _) = next(iter(skipped.items()))
        return CheckpointError(path, f"all {len(skipped)} tensors are {kind}, or the like", key=plain(first))
    keys = [str(key) for key in loaded]
    if "ds_version" in keys or "optimizer_state_dict" in keys:
        reason = "holds no model weights: optimizer state only, as in a shard of DeepSpeed ZeRO"
        return CheckpointError(path, reason, fix=_CONSOLIDATE)
    if "param_groups" in keys or any("optim" in key for key in keys):
        reason, fix = "holds no model weights: optimizer state only", "Name the file of the weights"
        return CheckpointError(path, reason, fix=fix)
    there = plain(", ".join(keys[:6]) + (", …" if len(keys) > 6 else "")) or "nothing"
    return CheckpointError(path, "holds no model weights", fix=f"In it: {there}")
