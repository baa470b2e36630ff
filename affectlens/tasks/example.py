"""One example: a JSON line `{id, text | messages, image, images, label, meta}`, and its chat."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from affectlens.errors import TaskError, quoted

_KINDS: dict[str, type | tuple[type, ...]] = {
    "id": (str, int, float),
    "label": (str, int, float),
    "text": str,
    "image": str,
    "images": list,
    "messages": list,
    "meta": dict,
}
_PARTS = ("text", "image")  # what a message may be made of
_TEXT = 1_000_000  # characters; a model's context is far shorter, and its tokenizer would take minutes
_PICTURES = 1000


@dataclass(frozen=True)
class Example:
    """Hold what a model is shown and the label it should give."""

    id: str
    label: str
    text: str = ""
    images: tuple[str, ...] = ()  # files; `sheet.png#xywh=x,y,w,h` cuts one picture out of a sheet
    messages: tuple[Mapping[str, Any], ...] = ()  # a ready chat; then `text` and `images` are not rendered
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """What this example shares with others (a face, a speaker, a dialogue); its id if nothing."""
        return str(self.meta.get("cluster", self.id))

    def chat(self, prompt: str = "{text}") -> list[dict[str, Any]]:
        """Render as chat messages: the pictures, then `prompt` with `{text}` filled in."""
        if self.messages:
            return [dict(message) for message in self.messages]
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in self.images]
        # Not str.format: a text with braces in it is data.
        parts.append({"type": "text", "text": prompt.replace("{text}", self.text).strip()})
        return [{"role": "user", "content": parts}]


def from_json(entry: Any, *, folder: Path, where: str) -> Example:
    """Read an example from a parsed JSON line; picture paths are relative to `folder`.

    Raises `TaskError` naming the line (`where`) for what is no example.
    """
    if not isinstance(entry, dict):
        raise TaskError(f"{where}: an example is a JSON object")
    entry = {name: value for name, value in entry.items() if value is not None}  # null is absent
    if "id" not in entry or "label" not in entry:
        raise TaskError(f"{where}: an example needs an id and a label; here: {_listed(entry) or 'nothing'}")
    if not any(entry.get(name) for name in ("text", "messages", "image", "images")):
        raise TaskError(f"{where}: an example needs text, messages, image or images")
    unknown = sorted(set(entry) - set(_KINDS))
    if unknown:
        raise TaskError(f"{where}: unknown fields {_listed(unknown)}. Known: {', '.join(_KINDS)}")
    for name, kind in _KINDS.items():
        if name in entry and not isinstance(entry[name], kind):
            wanted = kind.__name__ if isinstance(kind, type) else "text or a number"
            raise TaskError(f"{where}: {name} is a {type(entry[name]).__name__}, not a {wanted}")
    if not isinstance(entry.get("meta", {}).get("cluster", ""), str | int | float):
        raise TaskError(f"{where}: the cluster is no text or number")
    for message in entry.get("messages", ()):
        _check_message(message, where)
    images = entry.get("images") or ([entry["image"]] if entry.get("image") else [])
    _check_sizes(entry, images, where=where)
    # What pandas writes for a label that is not there.
    absent = isinstance(entry["label"], float) and math.isnan(entry["label"])
    return Example(
        id=str(entry["id"]),
        label="" if absent else str(entry["label"]),
        text=entry.get("text", ""),
        images=tuple(str(folder / image) for image in images),
        messages=tuple(entry.get("messages", ())),
        meta=entry.get("meta", {}),
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name if name.isidentifier() else quoted(name) for name in islice(names, 8))


def _check_message(message: Any, where: str) -> None:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
        raise TaskError(f"{where}: a message is an object with role and content")
    content = message["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else _parts(content, where):
        if not (isinstance(part, dict) and isinstance(part.get("type"), str)):
            raise TaskError(f"{where}: a message's content is text, or objects with a type")
        if part["type"] not in _PARTS:
            known = " or ".join(_PARTS)
            raise TaskError(f"{where}: a message has a part of type {quoted(part['type'])}, not {known}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise TaskError(f"{where}: a message has a part of type text without a text")


def _parts(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise TaskError(f"{where}: a message's content is text, or objects with a type")
    return content


def _check_sizes(entry: Mapping[str, Any], images: list[Any], *, where: str) -> None:
    size = len(entry.get("text", "")) + (len(str(entry["messages"])) if "messages" in entry else 0)
    if size > _TEXT:
        raise TaskError(f"{where}: a text of {size:,} characters; most are {_TEXT:,}")
    if len(images) > _PICTURES:
        raise TaskError(f"{where}: {len(images):,} pictures; most are {_PICTURES:,}")
    for image in images:
        if not isinstance(image, str):
            raise TaskError(f"{where}: a picture is named by a text, not by a {type(image).__name__}")
