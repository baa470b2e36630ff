"""A folder of copies that hold no code, no path and no address: all that transformers gets to see of a model.

    a stranger's folder ── short, ordinary, known files ──▶ cleaned ──▶ a folder of its own, gone afterwards

What transformers does follows from files: an `adapter_config.json` beside a model makes it fetch another
one, an `attn_implementation` can name code on a hub, a `tokenizer_file` any path. What is not copied can't.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from affectlens.checkpoints.folders import inside
from affectlens.checkpoints.parsing import parse
from affectlens.errors import CheckpointError
from affectlens.files import opened

# What transformers reads beside weights, and what code of a model's own may read.
KNOWN = re.compile(
    r"(?:generation_|processor_|preprocessor_|video_preprocessor_|tokenizer_)?config\.json"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|tekken\.json|chat_template\.(?:json|jinja)"
    r"|additional_chat_templates/[^/]+\.jinja"
    r"|(?:[\w-]*vocab[\w-]*|merges|dict|normalizer|emoji|byte_maps|word_\w+)\.(?:json|txt)"
    r"|[\w.-]+\.(?:model(?:\.v\d+)?|spm|codes|tokenizer|tiktoken)"
)
BESIDE_CODE = re.compile(KNOWN.pattern + r"|[^/]+\.(?:json|txt|jinja)|.+\.py")

_NOT = ("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_CONFIG = re.compile(r".*config\.json")
_LARGEST = 128_000_000  # bytes; the longest tokenizer.json there is has a fourth of it
_MOST = 2000  # files

_CODE = {"auto_map", "custom_generate", "init_inputs"}
_ADDRESSES = {
    "_name_or_path", "name_or_path", "audio_tokenizer", "transformers_weights", "configuration_files",
    "fast_tokenizer_files", "use_pretrained_backbone",
}  # fmt: skip
# What exchanges modules for others, from a hub or from packages; weights are unpacked by us.
_MACHINERY = {
    "_experts_implementation", "experts_implementation", "quantization_config", "use_kernels",
    "kernel_config", "fusion_config", "distributed_config",
}  # fmt: skip
_ATTENTION = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_TUPLES = {"return_dict", "use_return_dict"}  # a model that answers in tuples could not be read
_FILE = re.compile(r".*_files?")


@contextmanager
def isolated(folder: Path, *, code: bool) -> Iterator[Path]:
    """Copy what transformers may see of a folder, its Python files only with `code`; gone after the block.

    Raises `CheckpointError` for what is no ordinary file, lies elsewhere or is no JSON.
    """
    with TemporaryDirectory(prefix="affectlens-") as root:
        room = Path(root) / (folder.resolve().name or "model")
        for name in visible(folder, code=code):
            path = inside(folder / Path(name).parent, Path(name).name)
            copy = room / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(_cleaned(_content(path), path, code=code))
        yield room


def visible(folder: Path, *, code: bool) -> list[str]:
    """The files of a folder that are copied, by their paths in it."""
    found = []
    for place, folders, files in os.walk(folder):  # which does not follow links
        folders[:] = [name for name in folders if code or name == "additional_chat_templates"]
        inner = Path(place).relative_to(folder)
        names = [(inner / name).as_posix() for name in files]
        found += [
            name for name in names if (BESIDE_CODE if code else KNOWN).fullmatch(name) and name not in _NOT
        ]
        if len(found) > _MOST:
            raise CheckpointError(folder, f"holds more than {_MOST:,} files that would be read")
    return sorted(found)


def _content(path: Path) -> bytes:
    with os.fdopen(opened(path), "rb") as stream:
        found = stream.read(_LARGEST + 1)
    if len(found) > _LARGEST:
        raise CheckpointError(path, f"larger than {_LARGEST:,} bytes")
    return found


def _cleaned(content: bytes, path: Path, *, code: bool) -> bytes:
    if not _CONFIG.fullmatch(path.name):
        return content
    found = parse(content, path).content
    try:
        clean = cleaned({k: v for k, v in found.items() if not _FILE.fullmatch(k)}, code=code)
        return json.dumps(clean).encode()
    except RecursionError:
        raise CheckpointError(path, "is nested too deep") from None


def cleaned(config: Any, *, code: bool = False) -> Any:
    """A config without what names code, files, repositories or other modules, at any depth."""
    if isinstance(config, list):
        return [cleaned(value, code=code) for value in config]
    if not isinstance(config, Mapping):
        return config
    dropped = _ADDRESSES | _MACHINERY | _TUPLES | (set() if code else _CODE)
    return {
        key: cleaned(value, code=code)
        for key, value in config.items()
        if key not in dropped
        and (key not in _ATTENTION or value in ("eager", "sdpa"))
        and (key not in ("dtype", "torch_dtype") or isinstance(kind(value), torch.dtype))
    }


def kind(name: object) -> torch.dtype | None:
    """The torch dtype of that name, if there is one that a model can compute in."""
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    wide = isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1
    return found if wide else None
