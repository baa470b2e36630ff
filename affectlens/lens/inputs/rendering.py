"""Render a chat template within bounds: it is a program of whoever made the checkpoint.

Jinja's sandbox keeps it from files and from Python; nothing keeps it from going round for ever. So while it
runs, the clock and the memory are looked at before each of its lines. One line may ask for any amount of
memory at once: where the system has a limit on that, it is lowered meanwhile.
"""

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from affectlens.errors import LensError

SECONDS = 10.0
_MEMORY = 1_000_000_000  # bytes on top of what was in use
_LONGEST = 20_000_000  # characters
_ONE_AT_A_TIME = Lock()  # the limit is the whole process's: two that set and reset it would leave it low
MEDIA = ("image", "audio", "video")
_PLACEHOLDER = re.compile(
    rf"({'|'.join(MEDIA)})_(?:token_(?:id|index)|patch_id|delay_token_id|latent_token_id)"
)
_DEEPEST = 5  # configs within configs; an omni model has three


def rendered(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a chat, by the template of a processor or tokenizer. Raises `LensError`."""
    _refuse_powers(processor.chat_template)
    with _limited(), _watched():
        text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if len(text) > _LONGEST:
        raise LensError(f"the chat template makes {len(text):,} characters of an example")
    return text


def spans(
    input_ids: Int[Tensor, "batch position"],
    attention_mask: Int[Tensor, "batch position"] | Bool[Tensor, "batch position"] | None = None,
    *,
    config: Any,
) -> dict[str, Bool[Tensor, "batch position"]]:
    """The positions of each medium that the model knows, and under `text` those of no medium.

    Padding, where the mask is 0, is in none. Media that a processor turns into another, as some do with the
    frames of a video, are where it put them.
    """
    there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    found = {
        medium: there & torch.isin(input_ids, torch.tensor(sorted(tokens), device=input_ids.device))
        for medium, tokens in _media_tokens(config).items()
    }
    text = there.clone()
    for mask in found.values():
        text &= ~mask
    return {**found, "text": text}


def _refuse_powers(templates: Any) -> None:
    """Raise `LensError` for `**`: one such line can take years, and no one can break in."""
    from jinja2 import Environment

    for template in templates.values() if isinstance(templates, Mapping) else (templates,):
        if "**" in template and any(part[1:] == ("operator", "**") for part in Environment().lex(template)):
            raise LensError("the chat template raises numbers to powers, which no chat needs; it is not run")


@contextmanager
def _limited() -> Iterator[None]:
    with _ONE_AT_A_TIME:
        try:
            with _less_to_have(_MEMORY):
                yield
        except MemoryError:
            raise _too_much() from None


@contextmanager
def _less_to_have(more: int) -> Iterator[None]:
    """Let what takes more than so many further bytes get a `MemoryError`, where the system can tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        import resource
    except (OSError, ImportError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _watched() -> Iterator[None]:
    end, most = time.thread_time() + SECONDS, _in_use() + _MEMORY

    def _watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise LensError(f"the chat template is not done after {SECONDS:g} s")
        if _in_use() > most:
            raise _too_much()
        return _watch

    before = sys.gettrace()
    sys.settrace(_watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _in_use() -> int:
    """The most memory that this process has had so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _too_much() -> LensError:
    return LensError(f"the chat template takes more than {_MEMORY:,} bytes of memory")


def _media_tokens(config: Any) -> Mapping[str, frozenset[int]]:
    """The ids of the placeholders of each medium, as a model's config and those within it name them.

    Media that the config names no token of are left out; `None` has no media.
    """
    found: dict[str, set[int]] = {}
    for medium, token in _placeholders(config, 0):
        found.setdefault(medium, set()).add(token)
    return {medium: frozenset(found[medium]) for medium in MEDIA if medium in found}


def _placeholders(config: Any, depth: int) -> Iterator[tuple[str, int]]:
    settings = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in settings.items():
        match = _PLACEHOLDER.fullmatch(name) if isinstance(name, str) else None
        if match and type(value) is int and value >= 0:
            yield match[1], value
        elif name == "vocabulary_map" and isinstance(value, Mapping):  # of Chameleon and Emu3
            yield from (("image", value["<image>"]),) if "<image>" in value else ()
        elif depth < _DEEPEST and hasattr(value, "to_dict"):
            yield from _placeholders(value, depth + 1)
