"""Write a folder whole or not at all: it gets its name when it is complete.

It is filled beside its place under another name, and renamed. An error or Ctrl-C leaves nothing; a killed
process leaves a folder `.affectlens-…`, which may be deleted. As after any copy, the system writes to the
disk later: a power cut may lose the folder.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from affectlens.checkpoints.documents import read_json
from affectlens.checkpoints.folders import BESIDE_CODE, RECORD, inside, visible
from affectlens.errors import AffectlensError, WriteError
from affectlens.files import opened

_LICENCE = r"(?i:licen[cs]e|notice|copying|(?:acceptable_)?use_policy)[^/]*"
BESIDE = f"{BESIDE_CODE.pattern}|{_LICENCE}"
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@contextmanager
def filled(out: str | Path, *, apart_from: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` if the block succeeds.

    Raises `WriteError` if `out` is a file or a folder that is not empty, if it is inside one of the folders
    `apart_from`, and if the disk is full. On error no output is left behind.
    """
    final = Path(os.path.realpath(out))
    _refuse_taken(out, final)
    for other in apart_from:
        if final.is_relative_to(os.path.realpath(other)):
            raise WriteError(
                f"{out}: is inside {other}, which is read and must not change; give another folder"
            )
    # Parents that this call makes, innermost first: on error they go too.
    lacking = [folder for folder in final.parents if not folder.exists()]
    room = final.parent / f".affectlens-{secrets.token_hex(8)}"
    done = False
    try:
        try:
            room.mkdir(parents=True)
            yield room
            # Another process may have put something there in the meantime.
            _refuse_taken(out, final)
            os.replace(room, final)
            done = True
        finally:
            if not done:
                shutil.rmtree(room, ignore_errors=True)
                for folder in lacking:
                    with suppress(OSError):
                        folder.rmdir()
    except OSError as error:
        if isinstance(error, AffectlensError):
            raise
        reason = os.strerror(error.errno) if error.errno else error
        raise WriteError(f"{out}: can't be written ({reason})") from error


def copy_companions(folder: Path, room: Path) -> None:
    """Copy what a model needs beside its weights: config, tokenizer, processor, licence, and named code.

    Raises `CheckpointError` for anything but an ordinary file.
    """
    for name in sorted(set(_names(folder))):
        source, copy = inside(folder / Path(name).parent, Path(name).name), room / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(opened(source), "rb") as original, open(copy, "xb") as stream:
            shutil.copyfileobj(original, stream)


def _refuse_taken(out: str | Path, final: Path) -> None:
    try:
        if not any(final.iterdir()):
            return
        reason = "the folder is not empty"
    except FileNotFoundError:
        return
    except NotADirectoryError:
        reason = "this is a file"
    except OSError as error:
        reason = f"can't be written ({error.strerror})"
    raise WriteError(f"{out}: {reason}; give a new or empty folder")


def _names(folder: Path) -> Iterator[str]:
    licences = [
        file.name for file in folder.iterdir() if re.fullmatch(_LICENCE, file.name) and file.is_file()
    ]
    for name in (*visible(folder, code=_brings_code(folder)), *licences):
        if name != RECORD and not name.endswith((".index.json", ".safetensors", ".bin")):
            yield name


def _brings_code(folder: Path) -> bool:
    """Return whether a config names classes in files beside it."""
    there = [name for name in _CONFIGS if os.path.lexists(folder / name)]
    return any("auto_map" in read_json(inside(folder, name)).content for name in there)
