"""Read a task's examples from JSON lines, a JSON array or a table."""

import csv
import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from affectlens.errors import TaskError
from affectlens.tasks.examples import Example, from_json

_LINE, _FILE = 64_000_000, 2_000_000_000  # bytes; the limits of one example and of a task
_START = 1000  # bytes in which an array begins
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_examples(file: Path) -> list[Example]:
    """Read JSON lines, a JSON array (`.json`), or a table (`.csv`, `.tsv`) whose columns are fields.

    Raises `TaskError`, which names the file, and the line or the entry.
    """
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
    seen: dict[str, str] = {}
    for where, entry in _entries(stream, file):
        example = from_json(entry, folder=file.parent, where=f"{file.name}, {where}")
        if (first := seen.setdefault(example.id, where)) != where:
            raise TaskError(f"{file.name}, {where}: the id {example.id!r} is already used in {first}")
        yield example


def _entries(stream: IO[bytes], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each entry of a file and where it is."""
    if file.suffix in _DELIMITERS:
        yield from _table(stream, file)
        return
    if file.suffix == ".json" and _begins_with_array(stream):
        entries = _parsed(stream.read(), file.name)
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))
        return
    for number, line in enumerate(_lines(stream, file), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"{file.name}, line {number}")


def _begins_with_array(stream: IO[bytes]) -> bool:
    begin = stream.read(_START).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    return begin.startswith(b"[")


def _table(stream: IO[bytes], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table: an empty cell is an absent field, and rows without ids are numbered."""
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter=_DELIMITERS[file.suffix], strict=True)
    try:
        for number, row in enumerate(reader, 1):
            where, columns = f"line {reader.line_num}", len(reader.fieldnames or ())
            if None in row or None in row.values():
                raise TaskError(
                    f"{file.name}, {where}: the header has {columns} columns, the row has another number"
                )
            yield where, {"id": str(number), **{name: cell for name, cell in row.items() if cell}}
    except UnicodeDecodeError:
        raise TaskError(f"{file.name}: not UTF-8 text") from None
    except csv.Error as error:
        raise TaskError(f"{file.name}, line {reader.line_num + 1}: not a table of text ({error})") from None
    finally:
        text.detach()  # the stream is closed by its owner


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
