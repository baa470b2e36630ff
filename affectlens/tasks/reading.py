"""Read JSON lines from whoever made them: every line is an example, or an error that names it."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from affectlens.errors import TaskError
from affectlens.tasks.example import Example, from_json

_LINE, _FILE = 64_000_000, 2_000_000_000  # bytes; what is longer is no example and no task


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
