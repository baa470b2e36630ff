"""Copy a model's files without code, paths and addresses, for transformers to read instead of the originals.

    a stranger's folder ── short, ordinary, known files ──▶ cleaned ──▶ temporary folder

Files decide what transformers does: an `adapter_config.json` beside a model makes it fetch another model, an
`attn_implementation` can name code on a hub, a `tokenizer_file` any path. A setting that is not copied can do
nothing.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from affectlens.checkpoints.documents import parse
from affectlens.checkpoints.folders import inside, visible
from affectlens.errors import CheckpointError, LensError, quoted
from affectlens.files import opened

_CONFIG = re.compile(r".*config\.json")
_LARGEST = 128_000_000  # bytes; four times the largest tokenizer.json known
_CODE = {"auto_map", "custom_generate", "init_inputs"}
# Paths and repositories that transformers would open or fetch.
_ADDRESSES = {
    "_name_or_path", "name_or_path", "audio_tokenizer", "transformers_weights", "configuration_files",
    "fast_tokenizer_files", "use_pretrained_backbone",
}  # fmt: skip
# These replace modules, by code from a hub or from other packages. Quantised weights are unpacked here.
_MACHINERY = {
    "_experts_implementation", "experts_implementation", "quantization_config", "use_kernels",
    "kernel_config", "fusion_config", "distributed_config",
}  # fmt: skip
_ATTENTION = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_TUPLES = {"return_dict", "use_return_dict"}  # without them a model returns tuples, which have no `.logits`
_FILE = re.compile(r".*_files?")
_ALLOW = "Read the code, then load(…, trust_remote_code=True). To inspect, compare and write, no code runs"


@contextmanager
def isolated(folder: Path, *, code: bool) -> Iterator[Path]:
    """Copy the files of a folder that transformers may see to a temporary folder for the block.

    Python files are copied only with `code`. Raises `CheckpointError` for a file that is too large, not an
    ordinary file, outside the folder, or not valid JSON.
    """
    with TemporaryDirectory(prefix="affectlens-") as root:
        room = Path(root) / (folder.resolve().name or "model")
        for name in visible(folder, code=code):
            path = inside(folder / Path(name).parent, Path(name).name)
            copy = room / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(_cleaned_bytes(_content_of(path), path, code=code))
        yield room


def cleaned(config: object, *, code: bool = False) -> object:
    """Return a config without the settings that name code, files, repositories or modules, at any depth.

    >>> cleaned({"model_type": "llama", "auto_map": {"AutoModel": "code.Model"}})
    {'model_type': 'llama'}
    """
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
        and (key not in ("dtype", "torch_dtype") or isinstance(torch_dtype(value), torch.dtype))
    }


def torch_dtype(name: object) -> torch.dtype | None:
    """Return the torch dtype with this name; None unless a model can compute in it.

    >>> torch_dtype("bfloat16"), torch_dtype("int8"), torch_dtype("load")
    (torch.bfloat16, None, None)
    """
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    # 8-bit floats are for storage: torch has hardly any operations on them.
    wide = isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1
    return found if wide else None


def refuse_own_code(name: str, config: Mapping[str, object]) -> None:
    """Raise `LensError` for a model that transformers can't build without the model's own code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if "auto_map" in config and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        files = sorted({f"{ref.split('.')[0]}.py" for ref in _references(config["auto_map"])})
        raise LensError(
            f"{name}: a model of type {quoted(model_type)} needs code of its own "
            f"({', '.join(map(quoted, files[:3]))}), which is not run by default. {_ALLOW}"
        )


def remote_code(room: Path, *, name: str, commit: str, asked: str) -> dict[str, str | list[str]] | None:
    """Return the `revision` and `files` of the code that a folder of copies names; None if it names none.

    The revision is the commit, or without one the SHA-256 of the files. Raises `LensError` where it is not
    the revision that was `asked` for, and where the code is in another repository, which no revision pins.
    """
    found = [ref for file in sorted(room.glob("*config.json")) for ref in _named(file)]
    if not found:
        return None
    for reference in found:
        if "--" in reference:
            raise LensError(
                f"{name}: its code is in another repository ({quoted(reference)}), which the revision does "
                "not pin, so it is not run. Download the code, and put it beside the model"
            )
    files = sorted(room.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(room).as_posix()} {len(content)}\0".encode() + content)
    revision = commit or f"sha256:{digest.hexdigest()}"
    if asked and not commit and asked != revision:
        raise LensError(f"{name}: expected the code of {quoted(asked)}, found {revision}")
    return {"revision": revision, "files": [file.relative_to(room).as_posix() for file in files]}


def _content_of(path: Path) -> bytes:
    with os.fdopen(opened(path), "rb") as stream:
        found = stream.read(_LARGEST + 1)
    if len(found) > _LARGEST:
        raise CheckpointError(path, f"larger than {_LARGEST:,} bytes")
    return found


def _cleaned_bytes(content: bytes, path: Path, *, code: bool) -> bytes:
    if not _CONFIG.fullmatch(path.name):
        return content
    found = parse(content, path).content
    try:
        clean = cleaned({k: v for k, v in found.items() if not _FILE.fullmatch(k)}, code=code)
        return json.dumps(clean).encode()
    except RecursionError:
        raise CheckpointError(path, "is nested too deeply") from None


def _named(file: Path) -> Iterator[str]:
    yield from _maps(parse(file.read_bytes(), file).content)


def _maps(config: object) -> Iterator[str]:
    """Yield what every `auto_map` in a config names, at any depth."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        yield from _references(value) if key == "auto_map" else _maps(value)


def _references(found: object) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
    for value in values:
        yield from _references(value)
