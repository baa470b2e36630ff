"""Code that a model brings along: off unless asked for, and then exactly the code that was named.

A folder's configs name classes in Python files beside them (`auto_map`). Loading such a model runs a
stranger's program, with everything its user may do. So it takes a word, and what ran is written down: the
commit on a hub, or the hash of the files.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from affectlens.checkpoints.parsing import parse
from affectlens.errors import LensError, quoted

_ALLOW = (
    "load(…, trust_remote_code=True) runs it, once you have read it; looking, comparing and writing need none"
)


def refuse_untold(name: str, config: Mapping[str, Any]) -> None:
    """Raise `LensError` for a model that can't be built without code of its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if "auto_map" in config and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        files = sorted({f"{ref.split('.')[0]}.py" for ref in _references(config["auto_map"])})
        raise LensError(
            f"{name}: a model of type {quoted(model_type)} is built by code of its own "
            f"({', '.join(map(quoted, files[:3]))}), which is not run. {_ALLOW}"
        )


def remote_code(room: Path, *, name: str, commit: str, asked: str) -> dict[str, Any] | None:
    """What code a folder of copies names: `revision` and `files`; None where it names none.

    The revision is the commit, or the SHA-256 of the files where there is none. Raises `LensError` where
    that is not what was `asked` for, or where the code is another repository's: no revision pins that.
    """
    found = [ref for file in sorted(room.glob("*config.json")) for ref in _named(file)]
    if not found:
        return None
    for reference in found:
        if "--" in reference:
            raise LensError(
                f"{name}: its code is in another repository ({quoted(reference)}), which the revision asked "
                "for does not pin, so it is not run. Download it, and put it beside the model"
            )
    files = sorted(room.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(room).as_posix()} {len(content)}\0".encode() + content)
    revision = commit or f"sha256:{digest.hexdigest()}"
    if asked and not commit and asked != revision:
        raise LensError(f"{name}: the code is not that of {quoted(asked)}, but {revision}")
    return {"revision": revision, "files": [file.relative_to(room).as_posix() for file in files]}


def _named(file: Path) -> Iterator[str]:
    yield from _maps(parse(file.read_bytes(), file).content)


def _maps(config: Any) -> Iterator[str]:
    """What every `auto_map` in a config names, at any depth."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        yield from _references(value) if key == "auto_map" else _maps(value)


def _references(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
    for value in values:
        yield from _references(value)
