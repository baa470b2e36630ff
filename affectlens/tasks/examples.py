"""Examples `{id, text | messages, image(s), audio, video, label, meta}`, and their chats."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from affectlens.errors import TaskError, quoted

_KINDS: dict[str, type | tuple[type, ...]] = {
    "id": (str, int, float),
    "label": (str, int, float),
    "text": str,
    "image": str,
    "images": list,
    "audio": (str, list),
    "video": (str, list),
    "messages": list,
    "meta": dict,
}
_JSON = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
}
_MEDIA = ("image", "audio", "video")
_PARTS = ("text", *_MEDIA)  # the types of the parts of a message
_ASSISTANT = ("assistant", "gpt", "model", "bot")  # names of the role that answers
_TEXT = 1_000_000  # characters; more than models take, and a tokenizer would need minutes
_MOST = {"image": 1000, "audio": 100, "video": 100_000}  # files of one example
_CONTENT = "the content of a message must be a string or a list of objects with a type"


Media = Any  # one file or several; once the example is made, a tuple


@dataclass(frozen=True)
class Example:
    """What a model is shown, and the label it should answer with.

    Media are files, one or several; a picture may also be a `PIL.Image`. A film is a video file, a folder of
    frames, or a tuple of frames. `image` is a shorter name for one of `images`.

    >>> example = Example("1", "happy", text="What a day!", image="face.png")
    >>> example.chat("{text} Which emotion is this?")[0]["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'What a day! Which emotion is this?'}]
    """

    id: str = ""
    label: str = ""
    text: str = ""
    images: Media = ()  # files; `sheet.png#xywh=x,y,w,h` is one picture of a sheet
    messages: tuple[Mapping[str, Any], ...] = ()  # a ready chat, whose parts place text and media
    meta: Mapping[str, Any] = field(default_factory=dict)
    audio: Media = ()
    video: Media = ()

    image: InitVar[Any] = None

    def __post_init__(self, image: Any) -> None:
        given = {"images": self.images, "audio": self.audio, "video": self.video}
        if image is not None:
            given["images"] = (*_several(given["images"]), image)
        for name, files in given.items():
            object.__setattr__(self, name, tuple(_named(one, name, self.id) for one in _several(files)))

    @property
    def media(self) -> Mapping[str, int]:
        """The number of files of each medium: `image`, `audio`, `video`."""
        return {"image": len(self.images), "audio": len(self.audio), "video": len(self.video)}

    @property
    def cluster(self) -> str:
        """What this example shares with others (a face, a speaker, a dialogue); by default its own id."""
        return str(self.meta.get("cluster", self.id))

    @property
    def closing(self) -> int:
        """The number of assistant turns that end `messages`; they hold the answer and are never shown."""
        shown = len(self.messages)
        while shown and self.messages[shown - 1].get("role") in _ASSISTANT:
            shown -= 1
        return len(self.messages) - shown

    def chat(self, prompt: str = "{text}") -> list[dict[str, Any]]:
        """Return chat messages: pictures, sounds, films, then `prompt` with `{text}` filled in.

        Of ready `messages`, assistant turns at the end are left out: they hold the answer.
        """
        if self.messages:
            return [dict(message) for message in self.messages[: len(self.messages) - self.closing]]
        parts: list[dict[str, Any]] = [
            {"type": kind} for kind, count in self.media.items() for _ in range(count)
        ]
        # Not str.format: a text with braces in it is data.
        parts.append({"type": "text", "text": prompt.replace("{text}", self.text).strip()})
        return [{"role": "user", "content": parts}]


def _several(files: Any) -> tuple[Any, ...]:
    """Return one file, or several in any sequence, as a tuple."""
    return tuple(files) if isinstance(files, Sequence) and not isinstance(files, str) else (files,)


def _named(file: Any, kind: str, where: str) -> Any:
    """Return a file as its name, the frames of a film as theirs, and a picture in memory as it is."""
    if isinstance(file, str):
        return file
    if isinstance(file, PathLike):
        return fspath(file)
    if kind == "images" and hasattr(file, "getexif"):  # a PIL.Image, without importing Pillow
        return file
    if kind == "video" and isinstance(file, Sequence):
        return tuple(_named(frame, "frames", where) for frame in file)
    wanted = "a file or a PIL.Image" if kind == "images" else "a file"
    raise TaskError(f"example {where!r}: one of {kind} must be {wanted}, got a {type(file).__name__}")


def from_json(entry: Any, *, folder: Path, where: str) -> Example:
    """Read an example from a parsed JSON line; paths of media are relative to `folder`.

    `audio` is a file or a list of files; `video` is a file, a folder of frames, or a list of frames.

    Raises `TaskError`, which names the line (`where`), for anything else than an example.
    """
    if not isinstance(entry, dict):
        raise TaskError(f"{where}: an example must be a JSON object, got {_json(entry)}")
    entry = {name: value for name, value in entry.items() if value is not None}  # null is absent
    if "id" not in entry or "label" not in entry:
        raise TaskError(
            f"{where}: an example needs an id and a label. Fields here: {_listed(entry) or 'none'}"
        )
    if not any(entry.get(name) for name in ("text", "messages", "image", "images", "audio", "video")):
        raise TaskError(f"{where}: an example needs text, messages, image, images, audio or video")
    unknown = sorted(set(entry) - set(_KINDS))
    if unknown:
        raise TaskError(f"{where}: unknown fields {_listed(unknown)}. Known: {', '.join(_KINDS)}")
    for name, kind in _KINDS.items():
        if name in entry and not isinstance(entry[name], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(dict.fromkeys(_JSON[one] for one in kinds))
            raise TaskError(f"{where}: {name} must be {wanted}, got {_json(entry[name])}")
    cluster = entry.get("meta", {}).get("cluster", "")
    if not isinstance(cluster, str | int | float):
        raise TaskError(f"{where}: meta.cluster must be a string or a number, got {_json(cluster)}")
    for message in entry.get("messages", ()):
        _check_message(message, where)
    media = {kind: _files(entry, kind) for kind in _MEDIA}
    _check_sizes(entry, media, where=where)
    found = {kind: tuple(str(folder / file) for file in files) for kind, files in media.items()}
    frames = isinstance(entry.get("video"), list)
    # pandas writes NaN for a missing label.
    absent = isinstance(entry["label"], float) and math.isnan(entry["label"])
    return Example(
        id=str(entry["id"]),
        label="" if absent else str(entry["label"]),
        text=entry.get("text", ""),
        images=found["image"],
        messages=tuple(entry.get("messages", ())),
        meta=entry.get("meta", {}),
        audio=found["audio"],
        video=(found["video"],) if frames and found["video"] else found["video"],
    )


def _files(entry: Mapping[str, Any], kind: str) -> list[Any]:
    several = entry.get(f"{kind}s") if kind == "image" else None
    found = several or entry.get(kind) or []
    return found if isinstance(found, list) else [found]


def _json(value: object) -> str:
    return _JSON.get(type(value), "null")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name if name.isidentifier() else quoted(name) for name in islice(names, 8))


def _check_message(message: Any, where: str) -> None:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
        raise TaskError(f"{where}: a message must be an object with role and content")
    content = message["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else _parts(content, where):
        if not (isinstance(part, dict) and isinstance(part.get("type"), str)):
            raise TaskError(f"{where}: {_CONTENT}")
        if part["type"] not in _PARTS:
            known = ", ".join(_PARTS)
            raise TaskError(f"{where}: a message has a part of type {quoted(part['type'])}. Types: {known}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise TaskError(f"{where}: a part of type text needs a text")


def _parts(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise TaskError(f"{where}: {_CONTENT}")
    return content


def _check_sizes(entry: Mapping[str, Any], media: Mapping[str, list[Any]], *, where: str) -> None:
    size = len(entry.get("text", "")) + (len(str(entry["messages"])) if "messages" in entry else 0)
    if size > _TEXT:
        raise TaskError(f"{where}: a text of {size:,} characters, the limit is {_TEXT:,}")
    for kind, files in media.items():
        if len(files) > _MOST[kind]:
            raise TaskError(f"{where}: {len(files):,} files of type {kind}, the limit is {_MOST[kind]:,}")
        for file in files:
            if not isinstance(file, str):
                raise TaskError(
                    f"{where}: a file of type {kind} must be named by a string, got {_json(file)}"
                )
