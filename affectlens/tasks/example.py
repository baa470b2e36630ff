"""One example: a JSON line `{id, text | messages, image, images, label, meta}`, and its chat."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affectlens.errors import TaskError

_KINDS = {"text": str, "image": str, "images": list, "messages": list, "meta": dict}
_FIELDS = ("id", "text", "messages", "image", "images", "label", "meta")


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
        raise TaskError(f"{where}: an example needs an id and a label; here: {', '.join(entry) or 'nothing'}")
    if not any(entry.get(name) for name in ("text", "messages", "image", "images")):
        raise TaskError(f"{where}: an example needs text, messages, image or images")
    unknown = sorted(set(entry) - set(_FIELDS))
    if unknown:
        raise TaskError(f"{where}: unknown fields {', '.join(unknown)}. Known: {', '.join(_FIELDS)}")
    for name, kind in _KINDS.items():
        if name in entry and not isinstance(entry[name], kind):
            raise TaskError(f"{where}: {name} is a {type(entry[name]).__name__}, not a {kind.__name__}")
    for message in entry.get("messages", ()):
        if not (isinstance(message, dict) and "content" in message):
            raise TaskError(f"{where}: a message is an object with role and content")
    images = entry.get("images") or ([entry["image"]] if entry.get("image") else [])
    return Example(
        id=str(entry["id"]),
        label=str(entry["label"]),
        text=str(entry.get("text", "")),
        images=tuple(str(folder / image) for image in images),
        messages=tuple(entry.get("messages", ())),
        meta=entry.get("meta", {}),
    )
