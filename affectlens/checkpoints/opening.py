"""Open whatever a user names: a folder, a file, a hub id, a live module, or a checkpoint already open."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Union

from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.safetensors import open_safetensors
from affectlens.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

Source = Union[str, Path, Checkpoint, "nn.Module"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"]


def open_checkpoint(source: Source) -> Checkpoint:
    """Open a checkpoint; only headers are read until a site is.

    `source` is a folder or file of safetensors, a hub id (`owner/name`, or `owner/name@revision`), a
    live `nn.Module`, or a `Checkpoint`, which is returned as it is. Raises `CheckpointError`.
    """
    if isinstance(source, Checkpoint):
        return source
    if not isinstance(source, str | Path):
        return _live(source)
    path = fetched(source)
    again = str(path.resolve()) if Path(source).exists() else str(source)
    return Checkpoint(open_safetensors(path, again))


def fetched(source: str | Path) -> Path:
    """Where a source lies here: itself, or a hub repository's files in the hub's cache."""
    if str(source) and Path(source).exists():
        return Path(source)
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(source, "there is no such file or folder")
    return download(str(source), _HUB_FILES)


def download(hub_id: str, patterns: list[str] | None = None) -> Path:
    """Fetch a hub repository's files (`owner/name@revision`) into the hub's own cache."""
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = "no such file or folder here, and the hub did not give it"
        raise CheckpointError(hub_id, f"{reason} ({type(error).__name__})") from error


def _live(source: object) -> Checkpoint:
    # A module exists only where torch has been imported; importing it here to ask would be slow.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.nn.Module):
        from affectlens.checkpoints.memory import from_module

        return from_module(source)
    raise CheckpointError(type(source).__name__, "is neither a path, a hub id, a Checkpoint nor a module")
