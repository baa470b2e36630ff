"""Render a chat template within bounds: it is a program of whoever made the checkpoint.

Jinja's sandbox keeps it from files and from Python; nothing keeps it from going round for ever. So while it
runs, the clock and the memory are looked at before each of its lines. One line may ask for any amount of
memory at once: where the system has a limit on that, it is lowered meanwhile.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any

from affectlens.errors import LensError

SECONDS = 10.0  # of the processor's time
_MEMORY = 1_000_000_000  # bytes on top of what was in use
_LONGEST = 20_000_000  # characters
_ONE_AT_A_TIME = Lock()  # the limit is the whole process's: two that set and reset it would leave it low


def rendered(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a chat, by the template of a processor or tokenizer. Raises `LensError`."""
    _refuse_powers(processor.chat_template)
    with _limited(), _watched():
        text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if len(text) > _LONGEST:
        raise LensError(f"the chat template makes {len(text):,} characters of an example")
    return text


def _refuse_powers(templates: Any) -> None:
    """Raise `LensError` for `**`: one such line can take years, and no one can break in."""
    from jinja2 import Environment

    for template in templates.values() if isinstance(templates, Mapping) else (templates,):
        if "**" in template and any(part[1:] == ("operator", "**") for part in Environment().lex(template)):
            raise LensError("the chat template raises numbers to powers, which no chat needs; it is not run")


@contextmanager
def _watched() -> Iterator[None]:
    # The time of this thread: on a busy machine it is the others that take long.
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


def _too_much() -> LensError:
    return LensError(f"the chat template takes more than {_MEMORY:,} bytes of memory")


def _in_use() -> int:
    """The most memory that this process has had so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
