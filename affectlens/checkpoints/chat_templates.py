"""Read the chat template in the files of a checkpoint, without transformers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from affectlens.checkpoints.documents import read_json
from affectlens.checkpoints.folders import inside
from affectlens.errors import CheckpointError
from affectlens.files import opened

_TEMPLATE = "chat_template.jinja"
# In the order in which transformers looks for it; the tokenizer's own comes last.
_IN_JSON = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_MOST = 4_000_000  # bytes


class ChatTemplate(NamedTuple):
    """A chat template, or several by name, and whether it is in the tokenizer's own settings."""

    text: str | Mapping[str, str]
    tokenizers: bool


def chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a model or adapter; None where its files have none.

    Raises `CheckpointError` for a file that can't be read.
    """
    if (folder / _TEMPLATE).exists():
        # Beside a processor, the file is the processor's.
        alone = not any((folder / name).exists() for name in _PROCESSORS)
        return ChatTemplate(_text(inside(folder, _TEMPLATE)), tokenizers=alone)
    for name in _IN_JSON:
        if (folder / name).exists():
            file = inside(folder, name)
            found = _named(read_json(file).content.get("chat_template"))
            if found:
                return ChatTemplate(found, tokenizers=name == _IN_JSON[-1])
    return None


def _named(found: object) -> str | Mapping[str, str] | None:
    """Return one template, or several by name: files list them as objects with `name` and `template`."""
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
    if isinstance(found, Mapping):
        return {str(name): text for name, text in found.items() if isinstance(text, str)}
    return found if isinstance(found, str) else None


def _text(file: Path) -> str:
    with os.fdopen(opened(file), "rb") as stream:
        raw = stream.read(_MOST + 1)
    if len(raw) > _MOST:
        raise CheckpointError(file, f"larger than {_MOST:,} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(file, "is not UTF-8 text") from None
