"""Let a model hear the sound tracks of the films that it is shown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from affectlens.tasks import Example
from affectlens.tasks.containers import has_sound


def heard(
    examples: Sequence[Example], *, hears: bool, processor: str, say: Callable[[str], None]
) -> tuple[Example, ...]:
    """Return examples with the sound tracks of their films among their sounds, where the processor takes any.

    Where it does not, `say` is given a remark. Raises `TaskError`, and `MissingExtra` without av.
    """
    tracks = [
        tuple(film for film in one.video if isinstance(film, str) and has_sound(film)) for one in examples
    ]
    if any(tracks) and not hears:
        say(f"films here have a sound track, but {processor} takes no sounds: the model gets pictures alone")
        return tuple(examples)
    return tuple(_with_sound(one, films) for one, films in zip(examples, tracks, strict=True))


def _with_sound(example: Example, tracks: tuple[str, ...]) -> Example:
    if not tracks or not example.messages:
        return replace(example, audio=(*example.audio, *tracks))
    sounds, films = iter(example.audio), iter(example.video)
    audio: list[str] = []

    def parts(content: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for part in content:
            yield part
            if part["type"] == "audio":
                audio.extend(sound for sound in (next(sounds, None),) if sound is not None)
            if part["type"] == "video" and (film := next(films, None)) in tracks:
                audio.append(str(film))
                yield {"type": "audio"}

    messages = tuple(
        message
        if isinstance(message["content"], str)
        else {**message, "content": [*parts(message["content"])]}
        for message in example.messages
    )
    return replace(example, messages=messages, audio=(*audio, *sounds))
