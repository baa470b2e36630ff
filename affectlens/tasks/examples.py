"""Examples: JSON lines `{id, text | messages, image(s), audio, video, label, meta}`, and their chats."""

import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

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
_LINE, _FILE = 64_000_000, 2_000_000_000  # bytes; the limits of one example and of a task


@dataclass(frozen=True)
class Example:
    """What a model is shown, and the label it should answer with.

    Media are given as files. A film is a video file, a folder of frames, or a tuple of frames.

    >>> example = Example("1", "happy", text="What a day!", images=("face.png",))
    >>> example.chat("{text} Which emotion is this?")[0]["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'What a day! Which emotion is this?'}]
    """

    id: str
    label: str
    text: str = ""
    images: tuple[str, ...] = ()  # files; `sheet.png#xywh=x,y,w,h` is one picture of a sheet
    messages: tuple[Mapping[str, Any], ...] = ()  # a ready chat, whose parts place text and media
    meta: Mapping[str, Any] = field(default_factory=dict)
    audio: tuple[str, ...] = ()
    video: tuple[str | tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("images", "audio", "video"):
            if isinstance(getattr(self, name), str):  # its letters would be taken for files
                raise TaskError(f"example {self.id!r}: {name} must be a tuple of files, got a string")

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


def read_examples(file: Path) -> list[Example]:
    """Read a file of JSON lines. Raises `TaskError`, which names the file or the line."""
    try:
        state = file.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe or device would never end
            raise TaskError(f"{file}: this is not an ordinary file")
        if state.st_size > _FILE:
            raise TaskError(f"{file}: larger than {_FILE:,} bytes")
        with open(file, "rb") as stream:
            return list(_examples(stream, file))
    except TaskError:
        raise
    except (FileNotFoundError, ValueError):  # ValueError: a name with a null character
        raise TaskError(f"{file}: no such file of examples") from None
    except OSError as error:
        raise TaskError(f"{file}: can't be read ({error.strerror})") from None
    except MemoryError:
        raise TaskError(f"{file}: does not fit into memory") from None


def _examples(stream: IO[bytes], file: Path) -> Iterator[Example]:
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(stream, file), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        example = from_json(_parsed(line, where), folder=file.parent, where=where)
        first = seen.setdefault(example.id, number)
        if first != number:
            raise TaskError(f"{where}: the id {example.id!r} is already used in line {first}")
        yield example


def _lines(stream: IO[bytes], file: Path) -> Iterator[bytes]:
    # Only line feeds end a line: JSON strings may hold the other line ends that Python knows.
    number = 0
    while line := stream.readline(_LINE + 1):
        number += 1
        if len(line) > _LINE:
            raise TaskError(f"{file.name}, line {number}: longer than {_LINE:,} bytes")
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parsed(line: bytes, where: str) -> Any:
    try:
        entry = json.loads(line.decode("utf-8"), object_pairs_hook=lambda pairs: _once(pairs, where))
        if b"\\ud" in line.lower():  # the escape of a lone surrogate parses, but can't be encoded again
            json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise TaskError(f"{where}: not UTF-8 text") from None
    except UnicodeEncodeError:
        raise TaskError(f"{where}: contains half of a character (a lone surrogate)") from None
    except RecursionError:
        raise TaskError(f"{where}: nested too deep") from None
    except ValueError as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"{where}: not valid JSON") from None
    return entry


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise TaskError(
            f"{where}: a field appears twice in one object: {', '.join(k for k, _ in pairs)[:100]}"
        )
    return found
