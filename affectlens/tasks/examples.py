"""One example: a JSON line `{id, text | messages, image(s), audio, video, label, meta}`, and its chat."""

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
_MEDIA = {"image": "a picture", "audio": "a sound", "video": "a frame of a film"}
_PARTS = ("text", *_MEDIA)  # what a message may be made of
_TEXT = 1_000_000  # characters; a model's context is far shorter, and its tokenizer would take minutes
_MOST = {"image": 1000, "audio": 100, "video": 100_000}  # of an example; of a film's frames some are shown
_LINE, _FILE = 64_000_000, 2_000_000_000  # bytes; what is longer is no example and no task


@dataclass(frozen=True)
class Example:
    """Hold what a model is shown and the label it should give.

    Media are files: pictures; sounds; and films, each a video file, a folder of frames, or a tuple of them.
    """

    id: str
    label: str
    text: str = ""
    images: tuple[str, ...] = ()  # files; `sheet.png#xywh=x,y,w,h` cuts one picture out of a sheet
    messages: tuple[Mapping[str, Any], ...] = ()  # a ready chat; its parts say where text and media stand
    meta: Mapping[str, Any] = field(default_factory=dict)
    audio: tuple[str, ...] = ()
    video: tuple[str | tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("images", "audio", "video"):
            if isinstance(getattr(self, name), str):
                raise TaskError(f"example {self.id!r}: {name} is a tuple of files, also where it is one")

    @property
    def media(self) -> Mapping[str, int]:
        """How many there are of each medium: `image`, `audio`, `video`."""
        return {"image": len(self.images), "audio": len(self.audio), "video": len(self.video)}

    @property
    def cluster(self) -> str:
        """What this example shares with others (a face, a speaker, a dialogue); its id if nothing."""
        return str(self.meta.get("cluster", self.id))

    def chat(self, prompt: str = "{text}") -> list[dict[str, Any]]:
        """Render as chat messages: pictures, sounds, films, then `prompt` with `{text}` filled in."""
        if self.messages:
            return [dict(message) for message in self.messages]
        parts: list[dict[str, Any]] = [
            {"type": kind} for kind, count in self.media.items() for _ in range(count)
        ]
        # Not str.format: a text with braces in it is data.
        parts.append({"type": "text", "text": prompt.replace("{text}", self.text).strip()})
        return [{"role": "user", "content": parts}]


def from_json(entry: Any, *, folder: Path, where: str) -> Example:
    """Read an example from a parsed JSON line; paths of media are relative to `folder`.

    `audio` is a file or a list of files; `video` a file, a folder of frames, or a list of frames.

    Raises `TaskError` naming the line (`where`) for what is no example.
    """
    if not isinstance(entry, dict):
        raise TaskError(f"{where}: an example is a JSON object")
    entry = {name: value for name, value in entry.items() if value is not None}  # null is absent
    if "id" not in entry or "label" not in entry:
        raise TaskError(f"{where}: an example needs an id and a label; here: {_listed(entry) or 'nothing'}")
    if not any(entry.get(name) for name in ("text", "messages", "image", "images", "audio", "video")):
        raise TaskError(f"{where}: an example needs text, messages, image, images, audio or video")
    unknown = sorted(set(entry) - set(_KINDS))
    if unknown:
        raise TaskError(f"{where}: unknown fields {_listed(unknown)}. Known: {', '.join(_KINDS)}")
    for name, kind in _KINDS.items():
        if name in entry and not isinstance(entry[name], kind):
            wanted = "text or a number" if kind == (str, int, float) else "text or a list"
            wanted = kind.__name__ if isinstance(kind, type) else wanted
            raise TaskError(f"{where}: {name} is a {type(entry[name]).__name__}, not a {wanted}")
    if not isinstance(entry.get("meta", {}).get("cluster", ""), str | int | float):
        raise TaskError(f"{where}: the cluster is no text or number")
    for message in entry.get("messages", ()):
        _check_message(message, where)
    media = {kind: _files(entry, kind) for kind in _MEDIA}
    _check_sizes(entry, media, where=where)
    found = {kind: tuple(str(folder / file) for file in files) for kind, files in media.items()}
    frames = isinstance(entry.get("video"), list)
    # What pandas writes for a label that is not there.
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
            known = ", ".join(_PARTS[:-1]) + f" or {_PARTS[-1]}"
            raise TaskError(f"{where}: a message has a part of type {quoted(part['type'])}, not {known}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise TaskError(f"{where}: a message has a part of type text without a text")


def _parts(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise TaskError(f"{where}: a message's content is text, or objects with a type")
    return content


def _check_sizes(entry: Mapping[str, Any], media: Mapping[str, list[Any]], *, where: str) -> None:
    size = len(entry.get("text", "")) + (len(str(entry["messages"])) if "messages" in entry else 0)
    if size > _TEXT:
        raise TaskError(f"{where}: a text of {size:,} characters; most are {_TEXT:,}")
    for kind, files in media.items():
        if len(files) > _MOST[kind]:
            raise TaskError(f"{where}: {len(files):,} files of type {kind}; most are {_MOST[kind]:,}")
        for file in files:
            if not isinstance(file, str):
                raise TaskError(f"{where}: {_MEDIA[kind]} is named by a text, not by a {type(file).__name__}")


def read_examples(file: Path) -> list[Example]:
    """Read a file of JSON lines. Raises `TaskError` naming the file, and the line where it is one."""
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
    except (FileNotFoundError, ValueError):  # a name with a null character is none
        raise TaskError(f"{file}: there is no such file of examples") from None
    except OSError as error:
        raise TaskError(f"{file}: can't be read ({error.strerror})") from None
    except MemoryError:
        raise TaskError(f"{file}: more than fits into memory") from None


def _examples(stream: IO[bytes], file: Path) -> Iterator[Example]:
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(stream, file), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        example = from_json(_parsed(line, where), folder=file.parent, where=where)
        first = seen.setdefault(example.id, number)
        if first != number:
            raise TaskError(f"{where}: 2 examples with the id {example.id!r}, the first in line {first}")
        yield example


def _lines(stream: IO[bytes], file: Path) -> Iterator[bytes]:
    # By line feeds alone: JSON allows the other ends of line that Python knows within a text.
    number = 0
    while line := stream.readline(_LINE + 1):
        number += 1
        if len(line) > _LINE:
            raise TaskError(f"{file.name}, line {number}: longer than {_LINE:,} bytes")
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parsed(line: bytes, where: str) -> Any:
    try:
        entry = json.loads(line.decode("utf-8"), object_pairs_hook=lambda pairs: _once(pairs, where))
        if b"\\ud" in line.lower():  # an escape may stand for half a character, which is no text
            json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise TaskError(f"{where}: not UTF-8 text") from None
    except UnicodeEncodeError:
        raise TaskError(f"{where}: holds half of a character (a lone surrogate)") from None
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
            f"{where}: a field stands twice in one object: {', '.join(k for k, _ in pairs)[:100]}"
        )
    return found
