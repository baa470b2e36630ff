"""What the files beside a checkpoint say of its tokenizer: the number of each token, and the chat template.

The files are read as data; no tokenizer is built.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from affectlens.checkpoints.bytes import LocalFile, Span
from affectlens.checkpoints.chat_templates import NAMES, chat_template
from affectlens.checkpoints.documents import read_json
from affectlens.checkpoints.folders import inside
from affectlens.checkpoints.store import Store
from affectlens.errors import CheckpointError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "tekken.json")
_LARGEST = 64_000_000  # bytes
_MOST = 10_000_000  # tokens; the largest vocabularies have a thirtieth of it
# Parts of tokenizer.json that decide which tokens a text becomes.
_PARTS = ("normalizer", "pre_tokenizer", "post_processor")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer in one folder, each with its size and time; `open_tokenizer` finds them.

    Equal ones have the same content, so that comparing them once is enough.
    """

    files: tuple[tuple[str, Path, int, int], ...]

    @property
    def paths(self) -> Mapping[str, Path]:
        """The paths by name."""
        return {name: path for name, path, _, _ in self.files}

    @cached_property
    def content(self) -> str:
        """A hash of the vocabulary's files: equal files are not parsed."""
        found = hashlib.sha256()
        for name in (*_VOCABULARIES, "added_tokens.json"):
            found.update(name.encode() + (_raw(self.paths[name]) if name in self.paths else b""))
        return found.hexdigest()

    @cached_property
    def tokens(self) -> Mapping[str, int] | None:
        """The number of each token; None if the files don't say it in a form that can be read."""
        found: dict[str, int] = {}
        if "tokenizer.json" in self.paths:
            known = _object(self._fast.get("model")).get("vocab")
            if isinstance(known, list):  # Unigram: pairs of a piece and its score, in order
                pieces = (piece[0] if isinstance(piece, list) and piece else None for piece in known)
                known = {piece: number for number, piece in enumerate(pieces) if isinstance(piece, str)}
            added = self._fast.get("added_tokens")
            found |= _numbers(known)
            found |= _numbers(
                {
                    one["content"]: one.get("id")
                    for one in (added if isinstance(added, list) else ())
                    if isinstance(one, dict) and isinstance(one.get("content"), str)
                }
            )
        elif "vocab.json" in self.paths:
            found |= _numbers(read_json(self.paths["vocab.json"]).content)
        elif "vocab.txt" in self.paths:
            # Tokens may hold the other line ends that `splitlines` knows.
            lines = _raw(self.paths["vocab.txt"]).decode("utf-8", "replace").removesuffix("\n").split("\n")
            found |= {line.removesuffix("\r"): number for number, line in enumerate(lines)}
        if found and "added_tokens.json" in self.paths:
            found |= _numbers(read_json(self.paths["added_tokens.json"]).content)
        return found or None

    @cached_property
    def parts(self) -> Mapping[str, Any]:
        """The parts of `tokenizer.json` that decide which tokens a text becomes; empty without that file."""
        model = _object(self._fast.get("model"))
        merges = model.get("merges")
        if isinstance(merges, list):  # older files write a pair as one string
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        return {**{name: self._fast.get(name) for name in _PARTS}, "merges": merges} if self._fast else {}

    @cached_property
    def templates(self) -> Mapping[str, str]:
        """The chat templates by name; the usual one is called "default"."""
        found = chat_template(self.paths)
        return found.by_name if found is not None else {}

    @cached_property
    def _fast(self) -> Mapping[str, Any]:
        return read_json(self.paths["tokenizer.json"]).content if "tokenizer.json" in self.paths else {}


def open_tokenizer(store: Store) -> TokenizerFiles | None:
    """Return the tokenizer files beside the files of a store; None if there are none on this machine."""
    found = dict(_beside(store))
    states = ((name, path, path.stat()) for name, path in found.items())
    files = tuple((name, path, state.st_size, state.st_mtime_ns) for name, path, state in states)
    return TokenizerFiles(files) if any(name in found for name in _VOCABULARIES) else None


def _beside(store: Store) -> Iterator[tuple[str, Path]]:
    names = (*_VOCABULARIES, "added_tokens.json", *NAMES)
    if not store.source:
        return
    if os.path.exists(store.source):  # noqa: PTH110  for any string, where Path.exists raises
        path = Path(store.source)
        folder = path if path.is_dir() else path.parent
        for name in names:
            if os.path.lexists(folder / name):
                yield name, inside(folder, name)
        return
    from huggingface_hub import try_to_load_from_cache

    repository, _, asked = store.source.partition("@")
    revision = str(store.facts.get("revision", "")) or asked or None
    for name in names:
        here = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(here, str):
            yield name, Path(here)


def _raw(path: Path) -> bytes:
    file = LocalFile(path)
    if file.size > _LARGEST:
        raise CheckpointError(path, f"larger than {_LARGEST:,} bytes")
    return bytes(Span(file, 0, file.size).read())


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _numbers(value: object) -> dict[str, int]:
    """Keep the tokens that have a number."""
    pairs = _object(value).items()
    return {token: number for token, number in pairs if type(number) is int and 0 <= number < _MOST}
