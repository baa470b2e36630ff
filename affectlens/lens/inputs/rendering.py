"""Render the chat template of a model within limits.

A chat template is a program by whoever made the checkpoint. Jinja's sandbox keeps it from files and from
Python, but not from endless loops. So a trace function checks time and memory before each line that runs. A
single line can allocate any amount of memory, so the process's memory limit is lowered meanwhile, where the
system has one.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, tzinfo
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any

from affectlens.errors import LensError
from affectlens.lens.memory_use import peak

# The date of Llama 3's own template: a prompt must not depend on the day on which it is made.
DATE = date(2024, 7, 26)
SECONDS = 10.0  # of processor time
_MEMORY = 1_000_000_000  # bytes on top of those in use before
_LONGEST = 20_000_000  # characters
_ONE_AT_A_TIME = Lock()  # the memory limit is per process: two threads that reset it could leave it low
Templates = str | Mapping[str, str]  # one, or several by name


def rendered(
    owner: Any, messages: Sequence[Mapping[str, Any]], *, template: Templates, **options: Any
) -> str:
    """Render a chat with a template as a processor or tokenizer does, on the fixed `DATE`.

    `options` are those of its `apply_chat_template` and of the template. Raises `LensError`, and whatever the
    template raises.
    """
    _refuse_powers(template)
    if isinstance(template, Mapping):
        if "default" not in template:
            raise LensError(f"there are several chat templates, none called default: {', '.join(template)}")
        template = template["default"]
    with _limited(), _dated(), _watched():
        text: str = owner.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    if len(text) > _LONGEST:
        raise LensError(f"the chat template rendered {len(text):,} characters; at most {_LONGEST:,} are read")
    return text


def variables(templates: Templates) -> frozenset[str]:
    """Return the names that templates read, but not those of attributes, as in `message.thinking`."""
    from jinja2 import Environment

    found = set[str]()
    for template in _all(templates):
        before = ""
        for _, kind, word in Environment().lex(template):
            if kind == "name" and before != ".":
                found.add(word)
            before = before if kind == "whitespace" else word
    return frozenset(found)


def _all(templates: Templates) -> Iterable[str]:
    return templates.values() if isinstance(templates, Mapping) else (templates,)


def _refuse_powers(templates: Templates) -> None:
    """Raise `LensError` for `**`: such an expression can take years, and nothing can interrupt it."""
    from jinja2 import Environment

    for template in _all(templates):
        if "**" in template and any(part[1:] == ("operator", "**") for part in Environment().lex(template)):
            raise LensError(
                "the chat template uses the operator **, which can run without end; it is not run"
            )


@contextmanager
def _limited() -> Iterator[None]:
    """Limit the memory of the block; one block at a time."""
    with _ONE_AT_A_TIME:
        try:
            with _memory_limit(_MEMORY):
                yield
        except MemoryError:
            raise _too_much() from None


@contextmanager
def _dated() -> Iterator[None]:
    """Give templates that ask for today's date the fixed `DATE` in the block."""
    from transformers.utils import chat_template_utils

    # Templates get the date from this module's own `datetime`; a variable of that name can't be passed.
    before = chat_template_utils.datetime
    chat_template_utils.datetime = _Fixed
    try:
        yield
    finally:
        chat_template_utils.datetime = before


class _Fixed(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_Fixed":
        return cls(DATE.year, DATE.month, DATE.day, tzinfo=tz)


@contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    """Raise `MemoryError` for an allocation beyond `more` bytes, where the system has such a limit."""
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
    """Check time and memory before every eighth line of Python that runs in the block."""
    # Processor time: on a busy machine the wall clock would stop a harmless template.
    end, most, lines = time.thread_time() + SECONDS, peak() + _MEMORY, 0

    def _watch(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines % 8:
            return _watch
        if time.thread_time() > end:
            raise LensError(f"the chat template took more than {SECONDS:g} s")
        if peak() > most:
            raise _too_much()
        return _watch

    before = sys.gettrace()
    sys.settrace(_watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _too_much() -> LensError:
    return LensError(f"the chat template needs more than {_MEMORY:,} bytes of memory")
