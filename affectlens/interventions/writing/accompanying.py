"""What lies beside the weights of a base, and goes along: config, tokenizer, processor, code, licence.

An allow-list, as for loading: a folder of a training run holds much else, and an adapter beside the weights
would be put on them by whoever loads the copy.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from affectlens.checkpoints.folders import RECORD, inside
from affectlens.checkpoints.parsing import read_json
from affectlens.files import opened
from affectlens.lens.models.isolating import BESIDE_CODE, visible

_LICENCE = r"(?i:licen[cs]e|notice|copying|(?:acceptable_)?use_policy)[^/]*"
BESIDE = f"{BESIDE_CODE.pattern}|{_LICENCE}"
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def accompany(folder: Path, room: Path) -> None:
    """Copy what a model needs beside its weights; raises `CheckpointError` for what is no ordinary file."""
    for name in sorted(set(_names(folder))):
        source, copy = inside(folder / Path(name).parent, Path(name).name), room / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(opened(source), "rb") as original, open(copy, "xb") as stream:
            shutil.copyfileobj(original, stream)


def _names(folder: Path) -> Iterator[str]:
    licences = [
        file.name for file in folder.iterdir() if re.fullmatch(_LICENCE, file.name) and file.is_file()
    ]
    for name in (*visible(folder, code=_brings_code(folder)), *licences):
        if name != RECORD and not name.endswith((".index.json", ".safetensors", ".bin")):
            yield name


def _brings_code(folder: Path) -> bool:
    """Whether a config names classes in files beside it."""
    there = [name for name in _CONFIGS if os.path.lexists(folder / name)]
    return any("auto_map" in read_json(inside(folder, name)).content for name in there)
