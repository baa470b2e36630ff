"""Read the chat template in the files of a tokenizer or processor, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from affectlens.checkpoints.bytes import LocalFile, Span
from affectlens.checkpoints.documents import read_json
from affectlens.errors import CheckpointError

_TEMPLATE = "chat_template.jinja"
# In the order in which transformers looks for it; the tokenizer's own comes last.
_IN_JSON = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
NAMES = (_TEMPLATE, *dict.fromkeys((*_IN_JSON, *_PROCESSORS)))
_MOST = 4_000_000  # bytes


class ChatTemplate(NamedTuple):
    """A chat template, or several by name, and whether it is in the tokenizer's own settings."""

    text: str | Mapping[str, str]
    tokenizers: bool

    @property
    def by_name(self) -> Mapping[str, str]:
        """All templates by name; a single one is called "default"."""
        return {"default": self.text} if isinstance(self.text, str) else self.text


def chat_template(paths: Mapping[str, Path]) -> ChatTemplate | None:
    """Return the chat template in some files, given by name; None where they have none.

    Raises `CheckpointError` for a file that can't be read.
    """
    if _TEMPLATE in paths:
        # Beside a processor, the file is the processor's.
        alone = not any(name in paths for name in _PROCESSORS)
        return ChatTemplate(_text(paths[_TEMPLATE]), tokenizers=alone)
    for name in _IN_JSON:
        found = _named(read_json(paths[name]).content.get("chat_template")) if name in paths else None
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


def _text(path: Path) -> str:
    file = LocalFile(path)
    if file.size > _MOST:
        raise CheckpointError(path, f"larger than {_MOST:,} bytes")
    return bytes(Span(file, 0, file.size).read()).decode("utf-8", "replace")
